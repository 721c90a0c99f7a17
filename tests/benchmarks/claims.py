"""What papers report of one method against another, and the arms by which `directions.py` asks a pretrained encoder.

Verdicts turn on the rates, measured on TREC. A random mask of BitFit's size reaches 25 to 27 % at 3e-3, 67 to 73 % at 1e-2,
89 to 92 % at 3e-2 and 90 % at 1e-1; BitFit reaches 76 to 84 % at 3e-3, and at 1e-2 86 % with two seeds but chance with a
third (at 3e-2 chance). APT and P-tuning v2 gain 12 and 8 points from 1e-2 to 3e-2. These four have the rate that is best here
on the mean of the seeds tried; every other arm was tried at one rate, that of the leaderboard for this encoder or near it.
Arms that differ in one choice alone (rank, place, mask, tokens) share theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

ACCURACY, LOSS = "test/accuracy", "test/loss"
SPREAD = "spread"
"""Of an arm with several runs a seed: standard deviation over mean of their losses."""
SMALLER = (LOSS, SPREAD)
"""Metrics of which less is better."""


@dataclass(frozen=True)
class Arm:
    """One way of training: words of the command line, `{seed}` filled in."""

    words: str
    each: tuple[str, ...] = ("",)
    """Further words, one run a seed for each."""


@dataclass(frozen=True)
class Comparison:
    """`better` is at least as good as `worse`."""

    better: str
    worse: str
    metric: str = ACCURACY
    margin: float = 0.0
    """How much may be missing to "as good as"."""


@dataclass(frozen=True)
class Claim:
    """What a paper reports, and how it is asked here."""

    text: str
    paper: str
    data: tuple[str, ...]
    words: str
    seeds: int
    comparisons: tuple[Comparison, ...]

    def arms(self) -> list[str]:
        """Every arm, in the order of the comparisons."""
        return list(dict.fromkeys(name for c in self.comparisons for name in (c.better, c.worse)))


RATES = ("optim.lr=1e-3", "optim.lr=3e-3", "optim.lr=1e-2")
LINEAR = "attn.q|k|v|o+mlp.up|down"
ARMS = {
    "fine-tuning": Arm("recipe=sft optim.lr=2e-4"),
    "child-tuning F": Arm("recipe=child_tuning optim.lr=2e-4 stack.child_tuning.variant=f stack.child_tuning.seed={seed}"),
    "child-tuning D": Arm("recipe=child_tuning optim.lr=2e-4 stack.child_tuning.num_samples=128"),
    "BitFit": Arm("recipe=bitfit optim.lr=3e-3"),
    "random mask": Arm(
        "recipe=fishmask optim.lr=3e-2 stack.fishmask.score=random stack.fishmask.density=0.00114965 stack.fishmask.seed={seed}"
    ),
    # No stack trains a head alone: a mask of one entry of 22.7 million comes close.
    "head only": Arm(
        "recipe=fishmask optim.lr=1e-2 stack.fishmask.score=random stack.fishmask.density=5e-8 stack.fishmask.seed={seed}"
    ),
    "APT": Arm("recipe=apt optim.lr=3e-2 stack.apt.num_virtual_tokens=16"),
    "P-tuning v2": Arm("recipe=p_tuning_v2 optim.lr=3e-2 stack.p_tuning_v2.num_virtual_tokens=16"),
    "prompt tuning": Arm("recipe=prompt_tuning optim.lr=3e-2 stack.prompt_tuning.num_virtual_tokens=16"),
    "parallel adapter": Arm(
        "recipe=parallel_adapter optim.lr=3e-3 stack.parallel_adapter.target=null stack.parallel_adapter.r=32 "
        "stack.parallel_adapter.scale=1"
    ),
    "serial adapter": Arm(
        "recipe=adapter optim.lr=3e-3 stack.adapter.sublayers=[ffn] stack.adapter.r=32 stack.adapter.activation=relu "
        "stack.adapter.train_norms=false"
    ),
    "DoRA": Arm(f"recipe=dora optim.lr=2e-3 stack.dora.r=8 stack.dora.alpha=16 stack.dora.target={LINEAR}"),
    "DoRA half rank": Arm(f"recipe=dora optim.lr=2e-3 stack.dora.r=4 stack.dora.alpha=8 stack.dora.target={LINEAR}"),
    "LoRA": Arm(f"recipe=sft_lora optim.lr=2e-3 stack.lora.r=8 stack.lora.alpha=16 stack.lora.target={LINEAR}"),
    "prefix MLP": Arm("recipe=prefix_tuning stack.prefix_tuning.reparam=mlp", RATES),
    "prefix flat": Arm("recipe=prefix_tuning stack.prefix_tuning.reparam=flat", RATES),
    "SPT-LoRA": Arm("recipe=spt optim.lr=2e-3 stack.spt.budget=82944 stack.spt.r=4 stack.spt.dropout=0"),
    "LoRA uniform": Arm(f"recipe=sft_lora optim.lr=2e-3 stack.lora.r=2 stack.lora.alpha=2 stack.lora.target={LINEAR}"),
    "FishMask 1024 rows": Arm("recipe=fishmask optim.lr=1e-3 stack.fishmask.num_samples=1024"),
    "FishMask 64 rows": Arm("recipe=fishmask optim.lr=1e-3 stack.fishmask.num_samples=64"),
    "random mask 0.5 %": Arm("recipe=fishmask optim.lr=1e-3 stack.fishmask.score=random stack.fishmask.seed={seed}"),
    "IA3": Arm("recipe=ia3 optim.lr=2e-2"),
    "CoDA all tokens": Arm("recipe=coda optim.lr=1e-3 stack.coda.eps=1 stack.coda.reduction=1"),
    "CoDA half": Arm("recipe=coda optim.lr=1e-3 stack.coda.eps=1 stack.coda.reduction=2"),
    "CoDA a quarter": Arm("recipe=coda optim.lr=1e-3 stack.coda.eps=1 stack.coda.reduction=4"),
}
CLAIMS = {
    "child_tuning": Claim(
        "Child-tuning D is at least as good as F, and F as plain fine-tuning, on few rows", "2109.05687",
        ("classify_trec",), "data.limit=400 steps=75", 5,
        (
            Comparison("child-tuning D", "child-tuning F"), Comparison("child-tuning F", "fine-tuning"),
            Comparison("child-tuning D", "fine-tuning"),
        ),
    ),
    "bitfit": Claim(
        "BitFit is better than a random mask of the same size, and that than the head alone", "2106.10199",
        ("classify_trec",), "steps=126", 3, (Comparison("BitFit", "random mask"), Comparison("random mask", "head only")),
    ),
    "prefixes": Claim(
        "Adaptive prefixes are at least as good as P-tuning v2 of the same length, and that as prompt tuning",
        "2305.15212, 2110.07602",
        ("classify_trec",), "steps=126", 3, (Comparison("APT", "P-tuning v2"), Comparison("P-tuning v2", "prompt tuning")),
    ),
    "parallel": Claim(
        "A parallel adapter is at least as good as a serial one of the same width at the feed-forward", "2110.04366",
        ("classify_trec",), "steps=60", 3,
        tuple(Comparison("parallel adapter", "serial adapter", metric) for metric in (ACCURACY, LOSS)),
    ),
    "dora": Claim(
        "DoRA is at least as good as LoRA at the same rank, and as good at half the rank", "2402.09353",
        ("classify_trec",), "steps=60", 3,
        tuple(Comparison(arm, "LoRA", m) for arm in ("DoRA", "DoRA half rank") for m in (ACCURACY, LOSS)),
    ),
    "prefix_mlp": Claim(
        "Prefix-tuning through an MLP trains more stably than the columns themselves: its loss depends less on the rate",
        "2101.00190", ("classify_trec",), "steps=60", 2, (Comparison("prefix MLP", "prefix flat", SPREAD),),
    ),
    "spt": Claim(
        "SPT-LoRA is better than LoRA spread evenly, at equal parameters", "2303.08566",
        ("classify_sst2", "classify_trec", "classify_agnews"), "steps=60", 1,
        tuple(Comparison("SPT-LoRA", "LoRA uniform", metric) for metric in (ACCURACY, LOSS)),
    ),
    "fishmask": Claim(
        "FishMask is better than a random mask of the same size, and 64 rows choose it about as well as 1024", "2111.09839",
        ("classify_trec",), "steps=60", 3,
        (
            Comparison("FishMask 1024 rows", "random mask 0.5 %"), Comparison("FishMask 64 rows", "random mask 0.5 %"),
            Comparison("FishMask 64 rows", "FishMask 1024 rows", margin=0.02),
        ),
    ),
    "ia3": Claim(
        "(IA)^3 is at least as good as BitFit and prompt tuning, each with under 0.2 % of the parameters", "2205.05638",
        ("classify_trec",), "steps=126", 3, (Comparison("IA3", "BitFit"), Comparison("IA3", "prompt tuning")),
    ),
    "coda": Claim(
        "CoDA loses little as fewer tokens go through the blocks", "2304.04947",
        ("classify_trec",), "steps=126", 2,
        (
            Comparison("CoDA half", "CoDA all tokens", margin=0.02),
            Comparison("CoDA a quarter", "CoDA all tokens", margin=0.04),
        ),
    ),
}  # fmt: skip
