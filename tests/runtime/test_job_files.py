"""Job files: what is written for each engine, by what each engine offers to check it, and what is never written."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrecipe.core.errors import UserError
from llmrecipe.core.redact import name_variable
from llmrecipe.runtime.job_files import ENGINES, Job, write_job
from llmrecipe.runtime.rendezvous import cluster_of

KEPT = Path(__file__).parent.parent / "fixtures" / "launch"
WORDS = ("recipe=dpo_lora", "model.path=it's a $HOME", "objective.name=$(date)", "data.path=[a, 'b\"c']")
COMMON: dict[str, Any] = {"words": WORDS, "nodes": 2, "nproc": 8, "gpus": 8, "variables": ("HF_TOKEN",), "restarts": 5}
JOBS = {
    "slurm": Job(
        "dpo", **COMMON, gpu="h100", cpus=64, image="nvcr.io/nvidia/pytorch:25.04", workdir="/home/a b",
        checkpoints="/scratch/runs", setup="module load cuda\nsource venv/bin/activate",
        options={"partition": "gpu", "time": "1-00:00:00", "exclusive": ""},
    ),
    "slurm_small": Job("sft", ("recipe=sft",), 1, 2),
    "skypilot": Job(
        "dpo", **COMMON, gpu="H100", cpus=64, image="nvcr.io/nvidia/pytorch:25.04", volume="s3://runs",
        setup="pip install -e .", options={"infra": "aws/us-east-1", "use_spot": "true", "disk_size": "512"},
    ),
    "skypilot_small": Job("sft", ("recipe=sft",), 1, 2, volume="a-volume", checkpoints="/data"),
    "kubernetes": Job(
        "dpo", **COMMON, cpus=64, image="registry/train:1", workdir="/code", volume="claim",
        options={
            "namespace": "team", "queue": "gpus", "memory": "512Gi", "priority_class": "high", "service_account": "trainer",
        },
    ),
    "kubernetes_small": Job(
        "sft", ("recipe=sft",), 1, 2, image="registry/train:1", volume="claim", options={"secret": "tokens"}
    ),
}  # fmt: skip


def written(case: str) -> str:
    return write_job(case.partition("_")[0], JOBS[case])


def kept(case: str) -> Path:
    return KEPT / f"{case}{ENGINES[case.partition('_')[0]].suffix}"


def tree(case: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(written(case))
    return found


@pytest.mark.parametrize("case", JOBS)
def test_a_job_file_is_what_it_was(case: str) -> None:
    assert written(case) == kept(case).read_text(encoding="utf-8")


STANDINS = "module() { :; }\nsource() { :; }\ncd() { :; }\n"
"""Commands of a script that this machine does not have."""


def run_command_of(case: str) -> list[str]:
    """The command a job runs on each machine, as its shell or kubelet hands it over."""
    engine = case.partition("_")[0]
    if engine == "kubernetes":
        command = tree(case)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
        return [word.replace("$$", "$") for word in command]
    text = tree(case)["run"] if engine == "skypilot" else written(case)
    script = 'srun() { while [ "$1" != llmrecipe ]; do shift; done; "$@"; }\nllmrecipe() { printf "%s\\0" llmrecipe "$@"; }\n'
    script += STANDINS + "HF_TOKEN=x\n"
    done = subprocess.run(["bash", "-c", script + text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("case", JOBS)
def test_words_reach_the_training_as_they_were_given(case: str) -> None:
    job, engine = JOBS[case], case.partition("_")[0]
    command = run_command_of(case)
    assert command[: 2 + len(job.words)] == ["llmrecipe", "launch", *job.words]
    folder = job.checkpoints or ("runs" if engine == "slurm" else "/checkpoints")
    assert command[2 + len(job.words) :] == [
        f"run.dir={folder}/{job.name}", "resume=auto", "--nproc", str(job.nproc), "--rendezvous", engine,
    ]  # fmt: skip


SBATCH = {
    "account", "array", "begin", "chdir", "constraint", "container", "cpus-per-gpu", "cpus-per-task", "dependency", "error",
    "exclude", "exclusive", "export", "gpus", "gpus-per-node", "gpus-per-task", "gres", "hold", "job-name", "mail-type",
    "mail-user", "mem", "mem-per-cpu", "mem-per-gpu", "nice", "no-requeue", "nodelist", "nodes", "ntasks", "ntasks-per-node",
    "open-mode", "output", "partition", "priority", "qos", "requeue", "reservation", "signal", "switches", "time", "time-min",
}  # fmt: skip
SRUN = {
    "ntasks-per-node",
    "kill-on-bad-exit",
    "wait",
    "cpus-per-task",
    "container-image",
    "container-mounts",
    "container-workdir",
}


@pytest.mark.parametrize("case", ["slurm", "slurm_small"])
def test_a_slurm_script_is_bash_with_options_that_slurm_has(case: str) -> None:
    text = written(case)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    assert len(options) == len(set(options)) == text.count("#SBATCH") and set(options) <= SBATCH
    step = re.search(r"^srun (.*)\\$", text, re.MULTILINE)
    assert step is not None and {word.partition("=")[0].removeprefix("--") for word in shlex.split(step[1])} <= SRUN
    # Options end where the first command begins.
    assert text.rindex("#SBATCH") < min(text.index(word) for word in (": ", "cd --", "srun") if f"\n{word}" in text)


ENDS = [(0, 0, False), (2, 0, False), (130, 0, True), (137, 4, True), (130, 5, False)]


@pytest.mark.parametrize(("code", "count", "requeued"), ENDS)
def test_slurm_queues_again_what_a_signal_stopped(code: int, count: int, requeued: bool) -> None:
    script = f'srun() {{ return {code}; }}\nscontrol() {{ echo "$@"; }}\n' + STANDINS
    environment = {"SLURM_RESTART_COUNT": str(count), "SLURM_JOB_ID": "7", "HF_TOKEN": "x", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script + written("slurm")], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (code, "requeue 7\n" if requeued else "")


def test_slurm_names_a_variable_that_is_not_set() -> None:
    done = subprocess.run(["bash", "-c", written("slurm")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0 and "HF_TOKEN: is not set where the job is submitted" in done.stderr


@pytest.mark.parametrize("case", ["skypilot", "skypilot_small"])
def test_a_skypilot_task_fits_its_schema(case: str) -> None:
    pytest.importorskip("sky", reason="SkyPilot is not installed")
    from sky.utils import common_utils, schemas

    config = tree(case)
    common_utils.validate_schema(config, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(config["resources"], schemas.get_resources_schema(), "resources: ")


@pytest.mark.parametrize("case", ["kubernetes", "kubernetes_small"])
def test_a_jobset_is_one_to_the_client(case: str) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="the models of the Kubernetes client are not installed")
    config = tree(case)
    read = models.JobsetV1alpha2JobSet.from_dict(config)
    # A field that the models do not know would be lost on the way.
    assert read.to_dict() == config


def test_pods_of_a_jobset_meet_at_the_first() -> None:
    pods = tree("kubernetes")["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = pods["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    found = cluster_of("kubernetes", {**environment, "JOB_COMPLETION_INDEX": "1"})
    assert (found.nodes, found.node, found.master) == (2, 1, "dpo-node-0-0.dpo:29400")
    assert pods["completions"] == pods["parallelism"] == found.nodes and container["ports"] == [
        {"containerPort": 29400, "protocol": "TCP"}
    ]


SECRET = "hf_a-value-nobody-writes"


@pytest.mark.parametrize("case", JOBS)
def test_the_value_of_a_secret_is_never_written(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("JOB_TEST_KEY", SECRET)
    name_variable("JOB_TEST_KEY")
    assert SECRET not in written(case)
    engine, job = case.partition("_")[0], JOBS[case]
    with pytest.raises(UserError, match="the value of a secret would be written"):
        write_job(engine, replace(job, words=(*job.words, f"objective.key={SECRET}")))


BASE: dict[str, Any] = {"name": "a", "words": ("recipe=sft",), "nodes": 1, "nproc": 2}
REFUSED = [
    ("slrm", {}, "--to: must be one of slurm, skypilot, kubernetes; got 'slrm'; did you mean 'slurm'"),
    ("slurm", {"name": "A_b"}, "--name: 'A_b' cannot name a job"),
    ("slurm", {"name": "a\n#SBATCH --uid=0"}, "cannot name a job"),
    ("slurm", {"variables": ("A=b",)}, "--env: must be the name of a variable"),
    ("slurm", {"volume": "x"}, "--volume: Slurm mounts nothing"),
    ("slurm", {"nproc": 8, "gpus": 8, "gpu": "h100\n#"}, "cannot be the type of a GPU"),
    ("slurm", {"options": {"time": "1 # 2"}}, "--set time=1 # 2"),
    ("slurm", {"options": {"nodes": "3"}}, "--set nodes: the job file gives --nodes already"),
    ("slurm", {"gpus": 8}, "each GPU has one process, and --gpus gives 8"),
    ("skypilot", {}, "--volume: a machine of SkyPilot loses its own disk"),
    ("skypilot", {"gpus": 2, "volume": "v"}, "--gpus 2: SkyPilot needs the type"),
    ("skypilot", {"volume": "v", "options": {"infr": "aws"}}, "did you mean 'infra'"),
    ("skypilot", {"volume": "v", "checkpoints": "runs"}, "--checkpoints: must be an absolute path"),
    ("kubernetes", {"volume": "v"}, "--image: Kubernetes needs an image"),
    ("kubernetes", {"image": "i"}, "name a persistent volume claim"),
    ("kubernetes", {"image": "i", "volume": "v", "setup": "x"}, "--setup: an image has everything"),
    ("kubernetes", {"image": "i", "volume": "v", "gpus": 2, "gpu": "H100"}, "use --gpus 2"),
    ("kubernetes", {"image": "i", "volume": "v", "options": {"memory": ""}}, "must be memory=VALUE"),
]


@pytest.mark.parametrize(("engine", "changes", "says"), REFUSED)
def test_what_an_engine_cannot_do_is_refused(engine: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        write_job(engine, Job(**{**BASE, **changes}))
