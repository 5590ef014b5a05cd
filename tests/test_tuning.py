"""The search behind ``qlinear tune``, on times that are made up, and the command where there is no GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from layers import mlp
from test_cli import Captured, run

import qlinear
from qlinear import tuning
from qlinear.format import DENSE
from qlinear.kernels import tuned
from qlinear.kernels.configs import Config, refusal
from qlinear.kernels.gauge import DeviceGauge
from qlinear.kernels.runtime import Target
from qlinear.kernels.search import Problem, Unusable, default_config, neighbours, plan
from qlinear.kernels.tile_table import MANY
from qlinear.kernels.tuned import Key, Table

TARGET = Target((9, 0), 132)
BF16 = torch.bfloat16
PROBLEM = Problem("w4a16", BF16, 16, 4096, 4096)
KEY = Key("NVIDIA H200", (9, 0), 132, tuned.triton.__version__, tuned.kernels_hash())


class Bowl:
    """Times that grow with the distance from a best configuration; each measurement takes a second."""

    def __init__(self, best: Config, broken: tuple[Config, ...] = (), crossover: int = 700) -> None:
        self.best, self.broken, self.crossover = best, broken, crossover
        self.now, self.asked = 0.0, []

    def seconds(self, config: Config) -> float:
        pairs = zip(vars(config).values(), vars(self.best).values(), strict=True)
        return 1e-5 * (1 + sum(abs(math.log2(a / b)) for a, b in pairs))

    def configs(self, problem: Problem, candidate: Config, best: Config) -> tuple[float, float]:
        self.now += 1.0
        self.asked.append((problem, candidate))
        if candidate in self.broken:
            raise Unusable("wrong: differs from the default by 1.0e+00")
        return self.seconds(candidate), self.seconds(best)

    def paths(self, problem: Problem, tokens: int, config: Config) -> tuple[float, float]:
        self.now += 1.0
        self.asked.append((problem, tokens))
        return tokens / self.crossover, 1.0

    def clock(self) -> float:
        return self.now


def table(folder: Path) -> Table:
    return Table(KEY, folder / KEY.file_name)


def measure(problems: list[Problem], bowl: Bowl, folder: Path, limit: float = math.inf, **options) -> tuning.Tuning:
    into = tuned.read(folder / KEY.file_name) if (folder / KEY.file_name).exists() else table(folder)
    return tuning.measure(problems, into, TARGET, bowl, limit, clock=bowl.clock, progress=False, **options)


@pytest.mark.parametrize(
    "best", [Config(16, 64, 4, 2, 8), Config(16, 256, 8, 5, 1), Config(16, 128, 8, 4, 32)], ids=str
)
def test_the_search_finds_the_best_and_keeps_it(best: Config, tmp_path: Path) -> None:
    bowl = Bowl(best)
    report = measure([PROBLEM], bowl, tmp_path)
    (found,) = report.found
    assert found.best == best and found.complete and report.left == 0
    chosen = default_config(PROBLEM, TARGET)
    assert found.gain == pytest.approx(bowl.seconds(chosen) / bowl.seconds(best)) and found.gain > 1
    assert tuned.read(report.path).configs == {("w4a16", BF16, 16, 4096, 4096): best}
    # Nothing twice, but for the winner, which is measured against the default again.
    candidates = [config for _, config in bowl.asked]
    assert candidates[-1] == best and len(set(candidates)) == len(candidates) - 1


def test_where_the_default_is_best_it_stays(tmp_path: Path) -> None:
    chosen = default_config(PROBLEM, TARGET)
    (found,) = measure([PROBLEM], Bowl(chosen), tmp_path).found
    assert (found.best, found.gain, found.complete) == (chosen, 1.0, True)


def test_what_is_wrong_never_wins(tmp_path: Path) -> None:
    best = Config(16, 64, 4, 2, 8)
    report = measure([PROBLEM], Bowl(best, broken=(best,)), tmp_path)
    (found,) = report.found
    assert found.best != best and found.left_out == {best: "wrong: differs from the default by 1.0e+00"}
    assert tuning.row(found)["left_out"] == {str(best): "wrong: differs from the default by 1.0e+00"}


def test_a_gain_that_does_not_repeat_is_not_believed(tmp_path: Path) -> None:
    class Lucky(Bowl):
        def configs(self, problem: Problem, candidate: Config, best: Config) -> tuple[float, float]:
            self.asked.append((problem, candidate))
            again = [config for _, config in self.asked].count(candidate) > 1
            return (2e-5 if again else 0.5e-5), 1e-5

    (found,) = measure([PROBLEM], Lucky(Config(16, 64, 4, 2)), tmp_path).found
    assert found.best == found.chosen


@pytest.mark.parametrize("limit", range(5))
def test_the_time_limit_holds_within_a_layer_and_the_best_so_far_is_kept(limit: int, tmp_path: Path) -> None:
    best = Config(16, 64, 4, 2, 8)
    bowl = Bowl(best)
    problems = [PROBLEM, Problem("w4a16", BF16, 64, 4096, 4096)]
    report = measure(problems, bowl, tmp_path, limit=limit)
    # One more measurement confirms what has won so far.
    assert limit <= bowl.now <= limit + 1 and report.left == 2
    if limit == 0:
        assert report.found == [] and not report.path.exists()
        return
    kept = tuned.read(report.path)
    assert len(kept.configs) == len(kept.partial) == 1
    (config,) = kept.configs.values()
    assert bowl.seconds(config) <= bowl.seconds(default_config(PROBLEM, TARGET))
    # The same call goes on: what is partial is searched again, what is known is not.
    after = measure(problems, Bowl(best), tmp_path)
    assert (after.known, after.left) == (0, 0) and not tuned.read(report.path).partial
    done = measure(problems, Bowl(best), tmp_path)
    assert (done.known, done.found, done.left) == (2, [], 0) and "2 were known" in str(done)
    assert len(measure(problems, Bowl(best), tmp_path, again=True).found) == 2


def test_the_crossover_is_searched_from_few_tokens_to_many(tmp_path: Path) -> None:
    problem = Problem("w4a16", BF16, 0, 4096, 4096)
    bowl = Bowl(default_config(PROBLEM, TARGET), crossover=700)
    (found,) = measure([problem], bowl, tmp_path).found
    assert found.fused_tokens == 512 and [tokens for _, tokens in bowl.asked] == [256, 512, 768]
    assert tuned.read(tmp_path / KEY.file_name).crossovers == {("w4a16", BF16, 4096, 4096): 512}
    for crossover, most in ((1, 128), (10**6, 4096)):
        (found,) = measure([problem], Bowl(bowl.best, crossover=crossover), tmp_path, again=True).found
        assert found.fused_tokens == most
    (late,) = measure([problem], Bowl(bowl.best), tmp_path, limit=2, again=True).found
    # What was known stays.
    assert late.fused_tokens is None and not late.complete
    assert tuned.read(tmp_path / KEY.file_name).crossovers == {("w4a16", BF16, 4096, 4096): 4096}


@pytest.mark.parametrize("fmt", DENSE.values(), ids=str)
@pytest.mark.parametrize("bucket", [8, 64, MANY])
def test_neighbours_can_be_used_and_differ(fmt, bucket: int) -> None:
    for target in (TARGET, Target((8, 9), 128), Target("gfx942", 304)):
        for n, k in ((4096, 4096), (576, 1536), (64, 96)):
            problem = Problem(fmt.name, BF16, bucket, n, k)
            start = default_config(problem, target)
            near = neighbours(start, problem, target)
            assert start not in near and len(set(near)) == len(near) and (k < 1000 or len(near) >= 2)
            assert all(refusal(c, bucket, n, k, fmt, BF16, target.capability) is None for c in near)


def test_the_plan_has_few_tokens_first_and_crossovers_last() -> None:
    layers = [("w8a8", 64, 64), ("w4a16", 4096, 4096), ("w4a16", 4096, 4096)]
    problems = plan(layers, BF16, [1, 5, 6000, 16])
    assert [(p.scheme, p.bucket) for p in problems] == [
        *(("w4a16", 8), ("w8a8", 8), ("w4a16", 16), ("w8a8", 16), ("w4a16", MANY), ("w8a8", MANY)),
        ("w4a16", 0),
    ]
    assert not [p for p in plan(layers, torch.float32, [600]) if p.bucket == 0]
    assert not [p for p in plan(layers, BF16, [1]) if p.bucket == 0]


def test_the_layers_of_a_model() -> None:
    model = qlinear.convert(mlp(), {"up": "w8a16", "down": None, "head": None})
    assert tuning._shapes(model, ["w4a16", "w8a8"]) == [
        ("w8a16", 64, 40),
        *(("w4a16", 40, 64), ("w8a8", 40, 64), ("w4a16", 7, 40), ("w8a8", 7, 40)),
    ]


def test_the_report_is_a_table_and_data(tmp_path: Path) -> None:
    problems = [PROBLEM, Problem("w4a16", BF16, 0, 4096, 4096)]
    report = measure(problems, Bowl(Config(16, 64, 4, 2, 8)), tmp_path)
    text, data = str(report), json.loads(json.dumps(report.to_dict()))
    assert "16x64-w4-s2-k8" in text and "kernel up to 512 tokens" in text and str(report.path) in text
    assert data["left"] == 0 and data["rows"][0]["best"] == "16x64-w4-s2-k8" and data["rows"][1]["fused_tokens"] == 512


def test_the_gauge_measures_and_refuses(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU, or through the interpreter."""
    from qlinear.kernels import gauge

    made = DeviceGauge(device, 0.001)
    problem = Problem("w4a16", torch.float16, 16, 128, 256)
    start = Config(16, 64, 4, 2)
    assert min(made.configs(problem, Config(16, 128, 4, 2), start)) > 0
    assert min(made.paths(problem, 130, Config(128, 128, 8, 2))) > 0
    with pytest.raises(Unusable, match=r"^\w+: "):
        made.configs(problem, Config(16, 96, 4, 2), start)
    right = gauge.matmul

    def wrong(x, packed, bias=None, config=None):
        return right(x, packed, bias, config) * (1.5 if config == Config(16, 128, 4, 2) else 1.0)

    monkeypatch.setattr(gauge, "matmul", wrong)
    with pytest.raises(Unusable, match="wrong: differs from the default"):
        made.configs(problem, Config(16, 128, 4, 2), start)


@pytest.mark.gpu
def test_tune_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLINEAR_CACHE", str(tmp_path))
    report = qlinear.tune([(512, 512)], ["w4a16"], tokens=[1, 300], time_limit=20)
    assert report.found and tuned.measured(torch.device("cuda")).path == report.path
    x, layer = torch.randn(1, 512, device="cuda").half(), torch.nn.Linear(512, 512).cuda().half()
    assert qlinear.QLinear.from_float(layer, "w4a16")(x).isfinite().all()


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="nothing to tune"):
        qlinear.tune([])
    with pytest.raises(ValueError, match="w3a16"):
        qlinear.tune([(64, 64)], ["w3a16"])
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        qlinear.tune([(64, 64)], dtype=torch.int8)
    with pytest.raises(RuntimeError, match="cpu is none that is here"):
        qlinear.tune([(64, 64)], device="cpu")
    for limit in (math.nan, -1.0, "300", None):
        with pytest.raises(ValueError, match=rf"number of seconds from 0 on, got {limit!r}"):
            qlinear.tune([(64, 64)], device="cpu", time_limit=limit)
    for limit in (0, math.inf):
        with pytest.raises(RuntimeError, match="cpu is none that is here"):
            qlinear.tune([(64, 64)], device="cpu", time_limit=limit)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--layer", "4096x4096"], "cuda is none that is here"),
        (["nowhere/at/all"], "cuda is none that is here"),
        ([], "either MODEL or --layer"),
        (["m", "--layer", "64x64"], "either MODEL or --layer"),
        (["--layer", "4096"], "NxK"),
        (["--layer", "4096xa"], "--layer 4096xa: a layer is NxK"),
        (["--layer", "4096x4096", "--tokens", "1,-3"], "--tokens 1,-3: wanted whole numbers from 1 on"),
        (["--layer", "4096x4096", "--tokens", "a"], "--tokens a: wanted whole numbers from 1 on"),
        (["--layer", "4096x4096", "--tokens", ""], "--tokens : wanted whole numbers from 1 on"),
        (["--layer", "4096x4096", "--device", "foo"], "--device foo: there is no such device; give cpu, cuda"),
        (["--clear", "--layer", "1x1"], "--clear measures nothing: it does not go with --layer"),
        (["--clear", "model"], "--clear measures nothing: it does not go with MODEL"),
        (["--clear", "--json", "x.json"], "--clear measures nothing: it does not go with --json"),
        (["--install", __file__, "--again"], "--install measures nothing: it does not go with --again"),
        (["--layer", "4096x4096", "--scheme", "w3a16"], "w3a16"),
        (["nowhere/at/all", "--time-limit", "nan"], "the time limit is a number of seconds from 0 on, got nan"),
        (["--layer", "4096x4096", "--time-limit", "-1"], "a number of seconds from 0 on, got -1.0"),
        (["--install", __file__], "no tuned table"),
    ],
    ids=lambda value: " ".join(value).replace(__file__, "FILE") or "nothing" if isinstance(value, list) else "",
)
def test_without_a_gpu_it_says_so_in_one_line(
    arguments: list[str], wanted: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QLINEAR_CACHE", str(tmp_path))
    assert run("tune", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and wanted in printed.err and len(printed.err.strip().splitlines()) == 1


def test_the_command_reports_installs_and_clears(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured
) -> None:
    monkeypatch.setenv("QLINEAR_CACHE", str(tmp_path))
    given: dict[str, object] = {}

    def tune(layers, schemes, **options):
        given.update(layers=layers, schemes=schemes, **options)
        return measure([PROBLEM], Bowl(Config(16, 64, 4, 2, 8)), tmp_path / "run")

    monkeypatch.setattr(qlinear, "tune", tune)
    options = ("--scheme", "w8a16", "--tokens", "1,64", "--dtype", "float16", "--time-limit", 9)
    assert run("tune", "--layer", "4096x4096", "--layer", "64X96", *options, "--json", tmp_path / "t.json") == 0
    assert given["layers"] == [(4096, 4096), (64, 96)] and given["schemes"] == ("w8a16",)
    assert given["tokens"] == [1, 64] and given["dtype"] == torch.float16 and given["time_limit"] == 9.0
    assert "16x64-w4-s2-k8" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0]["best"] == "16x64-w4-s2-k8"

    assert run("tune", "--install", tmp_path / "run" / KEY.file_name) == 0
    assert "1 entries are kept" in capsys.readouterr().out and len(tuned.tables()) == 1
    assert run("tune", "--clear") == 0
    assert "removed 1 tuned tables" in capsys.readouterr().out and tuned.tables() == []
