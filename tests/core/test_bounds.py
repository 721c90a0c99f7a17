"""What a file, a server or a template can take is bounded, and every refusal says what was too much."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrecipe.core import http_client, time_limit
from llmrecipe.core.errors import DataError, RecipeError, RunError
from llmrecipe.core.http_client import Client
from llmrecipe.core.time_limit import BoundError, awaited, bounded, compiled, matches, within
from llmrecipe.data.formats.bounds import Bounds
from llmrecipe.data.formats.readers import open_file
from llmrecipe.data.formats.splits import open_split
from llmrecipe.data.tokenize.chat_templates import Template
from llmrecipe.pipelines.search.space import grid_points
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.interpolation import interpolate
from llmrecipe.recipe.overrides import parse_overrides
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.search_section import SearchSection
from llmrecipe.recipe.yaml_file import DEEPEST, load_bounded, read_yaml
from tests.servers import server

NINE = range(1, 12)
YAML = {
    "laughs": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in NINE), "aliases"),
    "copies": ("a: &a {x: 1, y: 2}\nb: {<<: [" + ",".join(["*a"] * 60_000) + "]}\n", "aliases"),
    "half": ('a:\n  b: "\\ud800"\n', "x.yaml:2: 'a.b': half of a surrogate pair"),
    "flow": ("a: " + "[" * 5000 + "]" * 5000, "deeper than 64"),
    "block": ("a:\n" + "".join(" " * i + "-\n" for i in range(1, 99)), "deeper than 64"),
    "chain": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 99)), "deeper than 64"),
    "digits": ("n: " + "9" * 5000, "x.yaml:1: 'n': not a value of type int"),
    "tag": ("n: 1\na: !!int abc", "x.yaml:2: 'a': not a value of type int: 'abc'"),
    "binary": ("a: !!binary aGk=", "the tag tag:yaml.org,2002:binary"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_bounded(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(YAML[name][0])
    with pytest.raises(RecipeError) as found:
        read_yaml(path)
    assert YAML[name][1] in str(found.value) and len(str(found.value)) < 500


def test_merges_of_merges_are_bounded(tmp_path: Path) -> None:
    """PyYAML before 6.0.4 writes every copy of a key out, which is refused; from then on one is left, and the file is read."""
    path = tmp_path / "x.yaml"
    path.write_text("a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in NINE))
    try:
        assert read_yaml(path).value == {f"a{i}": {"x": 1} for i in range(12)}
    except RecipeError as error:
        assert "aliases" in str(error)


def test_yaml_within_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\nd: " + "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2))
    value = read_yaml(path).value
    assert value["b"] == {"x": [1, 2]} and value["c"] == {"x": [1, 2], "y": 3} and value["d"]
    path.write_bytes(b"#" + b" " * (17 << 20))
    with pytest.raises(RecipeError, match="larger than 16 MB"):
        read_yaml(path)


def test_a_number_that_cannot_be_written_again_is_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("defaults: [/sft_lora, _self_]\nseed: 0x" + "f" * 6000)
    with pytest.raises(RecipeError, match="seed: must be a whole number; got '0xfff"):
        compose(path)


@pytest.mark.parametrize("kind", ["text", "lists", "relative"])
def test_names_of_names_do_not_grow_without_end(kind: str, tmp_path: Path) -> None:
    """Each of nine values names the one before it twelve times."""
    name = "${.a%d}" if kind == "relative" else "${vars.a%d}"
    lines = ["  a0: xxxxxxxxxxxxxxxxxxxx"]
    for i in range(1, 9):
        names = [name % (i - 1)] * 12
        lines.append(f"  a{i}: {json.dumps(names if kind == 'lists' else ''.join(names))}")
    path = tmp_path / "x.yaml"
    path.write_text("defaults: [/sft_lora, _self_]\nvars:\n" + "\n".join(lines))
    with pytest.raises(RecipeError, match=r"vars.a\d.*more than 16 million characters \[.*x.yaml:\d"):
        compose(path)


def test_values_that_name_others_in_a_long_chain_are_refused() -> None:
    chain = {f"a{i}": f"${{vars.a{i + 1}}}" for i in range(600)}
    with pytest.raises(RecipeError, match=r"^vars\.a0: \$\{vars\.a1\} names itself in a circle"):
        interpolate({"vars": {**chain, "a600": "x"}}, {})


def test_what_a_recipe_multiplies_is_bounded(tmp_path: Path) -> None:
    many = "[" + ", ".join(map(str, range(200))) + "]"
    cases = {
        f"stages: {{a: {{recipe: sft_lora, matrix: {{x: {many}, y: {many}}}}}}}": "stages.a.matrix: it makes 40,000 stages",
        "defaults: [" + "/sft_lora, " * 200 + "_self_]": r"x.yaml:1: 201 entries; at most 100 are read",
    }
    for text, said in cases.items():
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(RecipeError, match=said):
            plan(compose(tmp_path / "x.yaml"))
    section = SearchSection.model_validate({"space": {"optim.lr": {"low": 0, "high": 1e12, "step": 1}}, "sampler": "grid"})
    with pytest.raises(RecipeError, match="a range has 1,000,000,000,001 values; at most 100,000"):
        grid_points(section)


def test_a_stored_stack_is_bounded() -> None:
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in NINE)
    for text in (laughs, "a: " + "[" * 500 + "]" * 500):
        with pytest.raises(yaml.YAMLError, match=r"aliases|deeper than 64"):
            load_bounded(text)
    value = {"base": {"path": "on", "n": 1e-5}, "layers": [{"x": [1, None, True, "1e-5", "010"]}]}
    assert load_bounded(yaml.safe_dump(value)) == value


@pytest.mark.parametrize("word", ["a=" + "[" * 500 + "]" * 500, "a=" + "{b:" * 90 + "1" + "}" * 90, "a=" + "9" * 6000])
def test_overrides_are_bounded(word: str) -> None:
    with pytest.raises(RecipeError):
        parse_overrides([word])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=99999999999999999999"], "seed: must be smaller than 2^53"),
        (["steps=2000000000"], "steps: must be <= 1e+09"),
        (["stack.lora.r=65537"], "stack.lora.r: must be <= 65536; got 65537"),
        (["batch.size=18446744073709551616"], "batch.size: must be smaller than 2^53"),
        (["model.config={x: [99999999999999999999]}"], "model.config.x.0: must be smaller than 2^53"),
    ],
)
def test_numbers_are_bounded(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as found:
        compose("sft_lora", words)
    assert said in str(found.value)


ROW = json.dumps({"text": "x"})


@pytest.mark.parametrize(
    "line",
    ['{"text": ' + "[" * 200 + "]" * 200 + "}", '{"text": ' + "[" * 10**5 + "}", '{"text": ' + "9" * 5000 + "}"],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_rows_are_bounded(line: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_text(f"{ROW}\n{line}\n" if kind == "jsonl" else f"[{ROW},\n{line}]")
    with pytest.raises(DataError, match=r"nested deeper than 128|more than 4300 digits|not valid JSON") as found:
        open_file(path).rows([0, 1])
    assert str(path) in str(found.value) and len(str(found.value)) < 400


def test_a_small_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    """Compressed, without line ends, or one value repeated; each with the key that allows more."""
    import pyarrow as pa
    from pyarrow import parquet

    tight = Bounds(unpacked=1000, line=100)
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(f"{ROW}\n".encode() * 100))
    with pytest.raises(DataError, match=r"x.jsonl.gz: more than 1,000 bytes once unpacked; .*data.max_unpacked=BYTES"):
        open_file(packed, tight)
    assert len(open_file(packed, Bounds(unpacked=10**5))) == 100
    table = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": ["x" * 50] * 10_000}), table)
    with pytest.raises(DataError, match="once unpacked"):
        open_file(table, tight)
    for kind in ("zstd", "lz4"):
        for new in (pa.ipc.new_file, pa.ipc.new_stream):
            words = pa.array(["y" * 20_000]).dictionary_encode()
            rows = pa.table({"text": ["x" * 5000] * 10, "word": pa.chunked_array([words] * 10)})
            with new(tmp_path / "x.arrow", rows.schema, options=pa.ipc.IpcWriteOptions(compression=kind)) as sink:
                sink.write_table(rows)
            with pytest.raises(DataError, match=r"x.arrow: more than 1,000 bytes once unpacked; .*data.max_unpacked=BYTES"):
                open_file(tmp_path / "x.arrow", tight)
            allowed = open_file(tmp_path / "x.arrow", Bounds(unpacked=10**6))
            assert [row["word"] for row in allowed.rows([0, 9])] == ["y" * 20_000] * 2
    long = {"jsonl": f"{ROW}\n" + json.dumps({"text": "x" * 200}), "txt": "a\n" + "x" * 200, "ndjson": "x" * 500}
    for kind, text in long.items():
        path = tmp_path / f"x.{kind}"
        path.write_text(text)
        number = 1 if kind == "ndjson" else 2
        with pytest.raises(DataError, match=rf"x.{kind}:{number}: a line of more than 100 bytes; data.max_line=BYTES"):
            open_file(path, tight).rows([0])
        if kind == "jsonl":
            with pytest.raises(DataError, match="a line of more than 100 bytes"):
                list(open_file(path, tight).stream())


def test_the_keys_reach_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "x" * 200}) + "\n")
    assert len(open_split(DataSection(path=str(path)), "train")[0].reader) == 1
    with pytest.raises(DataError, match="more than 50 bytes"):
        len(open_split(DataSection(path=str(path), max_line=50), "train")[0].reader)


def test_a_pattern_that_explodes_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SECONDS", 0.2)
    bad = compiled(r"(?:x|x)*[yz]$", "here")
    found: list[Any] = []

    def try_it() -> None:
        searches = [lambda text, where, find=find: within(find, text, where) for find in (bad.search, bad.fullmatch)]
        for search in (*searches, lambda text, where: matches(bad, text, where)):
            with pytest.raises(RunError, match=r"reward.pattern: this pattern takes longer than 0.2 s on a text of 60"):
                search("x" * 60, "reward.pattern")
            found.append(search)

    thread = threading.Thread(target=try_it)  # the timeout holds in every thread
    thread.start()
    thread.join()
    assert len(found) == 3
    assert within(compiled("a.c", "here", dot_all=True).search, "xa\nc", "here") and not within(
        compiled("a.c", "here").search, "a\nc", "here"
    )
    with pytest.raises(RecipeError, match="here: not a regular expression"):
        compiled("(", "here")


def template(text: str) -> Template:
    return Template("mine", text, named=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"longer than 0.1 s"),
        ("{{ 'x' * 99999999999 }}", "more than 1,024 MB"),
        ("{{ '%99999999999d' % 1 }}", "chat_template|refuses"),
        ("{% if %}", r"\(mine\), line 1: not a Jinja template"),
    ],
)
def test_a_template_is_bounded(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrecipe.data.tokenize.chat_templates.bounded", lambda: bounded(0.1))
    with pytest.raises(Exception, match=said) as found:
        template(text).render([{"role": "user", "content": "x"}])
    assert type(found.value).__name__ in ("DataError", "BadRow")


def test_a_template_that_fails_refuses_the_row() -> None:
    from llmrecipe.data.formats.bad_row import BadRow

    refusing = ("{{ 1 // 0 }}", "{{ messages[5].x.y }}", "{{ raise_exception('no') }}", "{{ 'a' + 1 }}", "{{ x() }}")
    for text in refusing:
        with pytest.raises(BadRow, match="refuses the conversation"):
            template(text).render([{"role": "user", "content": "x"}])


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_bounds_end_with_the_block() -> None:
    with pytest.raises(BoundError), bounded(0.05):
        spin(5.0)
    with bounded(0.05):
        pass
    spin(0.1)


def test_a_reply_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "LARGEST_REPLY", 1000)
    with server((200, b"x" * 5000)) as (url, asked), pytest.raises(RunError, match="larger than 0 MB"):
        Client(url, "judge", "reply", retries=3).post({})
    assert len(asked) == 1, "a retry would not help"


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_a_reply_is_bounded_in_time(start: bytes) -> None:
    """A byte now and then does not keep a request alive, neither in the headers nor in the body."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        caller, _ = listener.accept()
        with caller:
            caller.recv(65536)
            caller.sendall(start)
            while not over.wait(0.05):
                try:
                    caller.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        with pytest.raises(RunError, match=r"no whole reply within 0.3 s"):
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}/", "judge", "reply", timeout=0.3, retries=0).post({})
    finally:
        over.set()
        thread.join()
        listener.close()


def tokenizer_with(pattern: str, part: str) -> Any:
    """The embedded tokenizer with one more pattern, in front of its own parts."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    from llmrecipe.core.paths import ASSETS

    found: Any = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    backend = found.backend_tokenizer
    if part == "pre_tokenizer":
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    else:
        backend.normalizer = normalizers.Replace(Regex(pattern), "x")
    return found


SLOW, GIVEN_UP = "a.*a.*a.*[!?]", "(a+)+[!?]"
"""A pattern of cubic time, and one of exponential time, on which its library gives up after a while."""


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize(("pattern", "said"), [(SLOW, "it takes longer than 0.02 s"), (GIVEN_UP, "retry-limit-in-match over")])
def test_a_pattern_of_a_tokenizer_is_bounded(pattern: str, said: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.data.tokenize import call_tokenizer as module
    from llmrecipe.data.tokenize.chat_templates import prompt_ids
    from llmrecipe.data.tokenize.special_tokens import Tokens

    tokenizer = tokenizer_with(pattern, part)
    tokens = Tokens(tokenizer)
    text = "a" * 180 if pattern == SLOW else "a" * 60
    expected = rf"tokenizer: it cannot encode . texts of [\d,]+ characters, the longest .*{said}; the patterns of its pre_tok"
    monkeypatch.setattr(module, "PER_CHARACTER", 0.0)
    monkeypatch.setattr(module, "SECONDS", 0.02 if pattern == SLOW else 5.0)
    with pytest.raises(DataError, match=expected) as found:
        tokens.raw([text, "b"])
    assert len(str(found.value)) < 500
    with pytest.raises(DataError, match=expected):
        prompt_ids(tokenizer, [{"role": "user", "content": text}])


def test_what_is_awaited_returns_and_raises_as_called() -> None:
    assert awaited(lambda: "x" * 3, 1.0) == "xxx"

    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException

    with pytest.raises(PanicException):
        awaited(panic, 1.0)
    # One thread serves calls that follow one another; one that was given up on is not waited for.
    threads = {awaited(threading.get_ident, 1.0) for _ in range(9)}
    assert len(threads) == 1
    over = threading.Event()
    with pytest.raises(BoundError, match=r"longer than 0 s"):
        awaited(over.wait, 0.0)
    assert awaited(threading.get_ident, 1.0) not in threads
    over.set()
    # A wait that takes no time of the processor is no fault of the function.
    assert awaited(lambda: time.sleep(0.3) or 1, 0.1) == 1


def test_code_that_catches_its_end_is_stopped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn() -> None:
        end = time.process_time() + 5.0
        while time.process_time() < end:
            with contextlib.suppress(Exception):  # such as a template's compiler, which then computes a constant later
                spin(5.0)

    with pytest.raises(BoundError, match=r"longer than 0.05 s"), bounded(0.05):
        stubborn()

    def deaf() -> None:
        try:
            spin(5.0)
        except BaseException:
            spin(5.0)

    monkeypatch.setattr("llmrecipe.core.time_limit.AGAIN", 0.05)
    with pytest.raises(BoundError, match=r"longer than 0.05 s"), bounded(0.05):
        deaf()


MAKES_ITS_OWN = {"models/tokenizer_training.py", "data/tokenize/call_tokenizer.py"}
"""One measures the tokenizer that it has trained, the other is the bounded call."""


def test_every_call_of_a_tokenizer_is_bounded() -> None:
    import ast

    import llmrecipe

    root = Path(llmrecipe.__file__).parent
    names = {"encode", "encode_plus", "batch_encode_plus", "apply_chat_template"}
    found = []
    for path in root.rglob("*.py"):
        place = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or place in MAKES_ITS_OWN:
                continue
            owner = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr in names else node.func
            called = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if called in ("tokenizer", "student", "teacher", "text_tokenizer"):
                found.append(f"{place}:{node.lineno}")
    assert not found, "call_tokenizer bounds it"
