"""benchmarks/op.py: measurements are right, the record is complete, and nothing that goes wrong is hidden."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import comparison, measure, peers, report
from benchmarks import export as bench_export
from benchmarks import op as bench_op
from benchmarks.comparison import Call, Inputs, Peer, Problem

ROOT = Path(__file__).resolve().parents[2]
EAGER = ("unfold-einsum", "upsample-unfold", "shifted-madd")
FROM_LOGITS = ("fused", "steps-carafe")
# Whatever ours is built as, a tiny size is enough for all but timings.
TINY = ["--quick", "--threads", "1", "--repeats", "2", "--shapes", "4x3x5"]


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {peer["name"]: peer for peer in result["peers"]}


def run(arguments: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
    file = folder / "result.json"
    code = bench_op.main([*arguments, "--json", str(file)])
    return code, json.loads(file.read_text())


# --------------------------------------------------------------------------------------------- measurements


def test_interleaving_takes_turns() -> None:
    turns: list[str] = []

    def work(name: str) -> Callable[[], None]:
        return lambda: turns.append(name)

    # An estimate of a second: one call a sample, none to warm up.
    timings = [measure.Timing(work(name), 1.0, repeats) for name, repeats in (("a", 3), ("b", 3), ("c", 1))]
    measure.interleave(timings)
    assert turns == ["a", "b", "c", "a", "b", "a", "b"]
    summary = timings[0].summary()
    assert summary["repeats"] == 3
    assert summary["significant_figures"] >= 1
    assert summary["min_ms"] <= summary["q1_ms"] <= summary["median_ms"] <= summary["q3_ms"] <= summary["max_ms"]


def test_peak_counts_every_byte_and_what_was_released() -> None:
    def work() -> torch.Tensor:
        temporary = torch.ones(1000, 1000)
        result = temporary[:500].clone()
        del temporary
        return result + 1  # 2 MB beside 2 MB: less than the 6 MB before

    assert measure.peak_bytes(work, "cpu") == 6_000_000


def test_peak_of_ours_is_no_multiple_of_its_tensors_and_hides_nothing() -> None:
    from carafe_plugin import is_compiled

    if not is_compiled("cpu"):
        pytest.skip("the compiled operator is not built; the PyTorch reference needs more memory, by its nature")
    problem = Problem(64, 50, 84)
    inputs = Inputs.random(problem)
    call = peers.OURS[0].setup(problem, inputs)

    def work() -> object:
        return comparison.run_pass(call, "forward")

    work()
    counted = measure.peak_bytes(work, "cpu")
    assert (
        inputs.grad_output.nbytes <= counted <= inputs.features.nbytes + inputs.masks.nbytes + inputs.grad_output.nbytes
    )

    # The system's own count, where it can be reset, shows memory that does not come from torch's allocator.
    if platform.system() != "Linux":
        pytest.skip("only Linux can reset the peak of the resident memory")
    gc.collect()
    try:
        before = measure._kibibytes("/proc/self/status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of the resident memory cannot be reset here: {error}")
    result = work()
    resident = measure._kibibytes("/proc/self/status", "VmHWM") - before
    del result
    assert resident <= counted + 3e6  # pages, malloc's slack


# ------------------------------------------------------------------------------------------------ the record


def test_settings_of_the_environment_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libjemalloc.so.2:/elsewhere/libomp.so")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setenv("OTHER_", "1")
    settings = measure.machine("cpu")["environment"]
    assert isinstance(settings, dict)
    assert settings["LD_PRELOAD"] == "libjemalloc.so.2 libomp.so"
    assert settings["MALLOC_MMAP_MAX_"] == settings["THP_MEM_ALLOC_ENABLE"] == "0"
    assert "OTHER_" not in settings


def test_record_is_complete_and_names_no_place(tmp_path: Path) -> None:
    plot = tmp_path / "result.svg"
    names = [*EAGER, "steps-carafe", "bilinear"]
    arguments = [*TINY, "6x4x4", "--group-size", "2", "--peers", *names, "--plot", str(plot)]
    code, record = run(arguments, tmp_path)
    assert code == 0
    assert plot.read_text().count("<svg") == 1
    assert {"schema", "command", "date", "revision", "version", "backend", "machine", "results"} <= set(record)
    assert {"cpu", "cores", "cpu_path", "threads", "instruction_set", "torch", "python"} <= set(record["machine"])
    assert record["machine"]["threads"] == 1
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert platform.node() not in text
    assert record["command"].endswith("--plot result.svg --json result.json")

    assert [result["shape"]["channels"] for result in record["results"]] == [4, 6]
    for result in record["results"]:
        measured = by_name(result)
        assert list(measured) == ["carafe", "fused", *names]
        for each in ("forward", "forward_backward"):
            assert result["bound"][f"{each}_ms"] > 0
            for name, peer in measured.items():
                values = peer[each]
                ours = measured["fused" if name in FROM_LOGITS else "carafe"][each]["median_ms"]
                assert values["status"] == "ok"
                assert 0 < values["min_ms"] <= values["q1_ms"] <= values["median_ms"]
                assert values["median_ms"] <= values["q3_ms"] <= values["max_ms"]
                assert len(values["samples_ms"]) == values["repeats"] == 2
                assert values["times_ours"] == pytest.approx(values["median_ms"] / ours, abs=1e-4)
                bound = result["bound"][f"{each}_ms"]
                assert values["times_bound"] == pytest.approx(values["median_ms"] / bound, rel=1e-3, abs=1e-4)
                assert values["peak_bytes"] >= 4 * result["shape"]["channels"] * 16
                needed = values["peak_bytes"] / result["bound"][f"{each}_needed_bytes"]
                assert values["times_needed_memory"] == pytest.approx(needed, abs=1e-4)
                assert ("error" in values) == (name in EAGER or name == "steps-carafe")
                assert ("saved_bytes" in values) == (each == "forward_backward")
        # The operator keeps its two inputs and nothing else.
        channels, height, width = (result["shape"][name] for name in ("channels", "height", "width"))
        kept = 4 * height * width * (channels + 2 * 25 * 4)
        for name in ("carafe", "fused"):
            assert measured[name]["forward_backward"]["saved_bytes"] == kept
            assert measured[name]["forward_backward"]["saved_tensors"] == 2
        assert measured["unfold-einsum"]["forward_backward"]["saved_bytes"] > 25 * 4 * height * width * channels


def test_multiples_of_the_bound_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["nearest", "carafe-float16", "carafe-channels-last"]
    code, record = run([*TINY, "6x4x4", "--peers", *names], tmp_path)
    assert code == 0
    shown = capsys.readouterr().out
    first = shown.index("Multiples of the bound")
    assert first < shown.index("4 x 3 x 5, up 2, k 5: forward") < shown.index("6 x 4 x 4, up 2, k 5: forward")
    lines = shown[first : shown.index("4 x 3 x 5, up 2, k 5: forward")].splitlines()
    assert not any("nearest" in line for line in lines)
    for name in ("carafe", "fused", "carafe-float16", "carafe-channels-last"):
        (line,) = [line for line in lines if f" {name} " in line]
        for result in record["results"]:
            passes = by_name(result)[name]
            assert ", ".join(f"{passes[each]['times_bound']:.2f}" for each in comparison.PASSES) in line


@pytest.mark.skipif(platform.system() != "Linux", reason="memory can be limited on Linux alone")
def test_run_from_the_shell_where_a_peer_runs_out_of_memory(tmp_path: Path) -> None:
    # 105 MB unfolded where 80 may be allocated; the output has 4. In a process of its own: what an earlier test has
    # freed would serve without counting as new.
    arguments = ["--quick", "--shapes", "64x64x64", "--memory-limit", "0.08", "--threads", "1", "--repeats", "1"]
    arguments += [
        "--peers",
        "upsample-unfold",
        "nearest",
        "--json",
        f"{tmp_path}/result.json",
        "--plot",
        f"{tmp_path}/result.png",
    ]
    command = [sys.executable, "-m", "benchmarks.op", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "forward + backward" in done.stdout
    assert "out of memory" in done.stdout
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    measured = by_name(json.loads((tmp_path / "result.json").read_text())["results"][0])
    assert measured["upsample-unfold"]["forward"]["status"] == "out of memory"
    assert measured["nearest"]["forward"]["status"] == "ok"


# ------------------------------------------------------------------------------------------------ growth


def test_growth_varies_one_thing_at_a_time() -> None:
    base = Problem(64, 50, 84)
    for axis in bench_op.VALUES:
        series = list(bench_op.points([axis], base, threads=4))
        assert len(series) >= 3
        assert {place["axis"] for _, place in series} == {axis}
        assert len({place["value"] for _, place in series}) == len(series)
        assert any(problem == base and place["threads"] == 4 for problem, place in series)
        own = {"size": {"height", "width"}, "scale": {"up", "down"}, "threads": set()}
        problems = [vars(problem) for problem, _ in series]
        changed = {name for sizes in problems for name, value in sizes.items() if value != getattr(base, name)}
        assert changed == own.get(axis, {axis.replace("-", "_")})
        assert {place["threads"] for _, place in series} == ({1, 2, 4} if axis == "threads" else {4})
    scales = [place["position"] for _, place in bench_op.points(["scale"], base, 1)]
    assert scales == [1 / 4, 1 / 3, 1 / 2, 1, 2, 3, 4]
    assert [place["threads"] for _, place in bench_op.points(["threads"], base, 6)] == [1, 2, 4, 6]


def test_growth_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "growth.svg"
    arguments = [*TINY, "--growth", "kernel-size", "threads", "--plot", str(plot)]
    code, record = run(arguments, tmp_path)
    assert code == 0
    assert record["results"] == []
    measured = [(result["axis"], result["value"], result["shape"]["kernel_size"]) for result in record["growth"]]
    assert measured == [("kernel-size", "1", 1), ("kernel-size", "3", 3), ("threads", "1", 5)]
    assert all(set(by_name(result)) == {"carafe", "fused"} for result in record["growth"])
    shown = capsys.readouterr().out
    assert "Growth with k around 4 x 3 x 5, up 2, k 5" in shown
    fused = record["growth"][0]["peers"][1]["forward_backward"]
    rate = record["growth"][0]["bound"]["forward_backward_flop"] / 1e6 / fused["median_ms"]
    assert f"{rate:.4g}" in shown
    assert plot.read_text().count("<svg") == 1


# ------------------------------------------------------------------------------------ what can go wrong


def with_peer(monkeypatch: pytest.MonkeyPatch, *added: Peer) -> None:
    monkeypatch.setattr(bench_op, "PEERS", (*peers.PEERS, *added))


def test_a_wrong_result_is_told_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {"scaled": lambda y: y * 1.01, "cropped": lambda y: y[..., :-1], "nan": lambda y: y * float("nan")}

    def setup(fault: Callable[[torch.Tensor], torch.Tensor], problem: Problem, inputs: Inputs) -> Call:
        call = peers.OURS[0].setup(problem, inputs)
        return Call(lambda: fault(call.forward()), call.wrt, call.grad_output)

    wrong = [Peer(name, "wrong", functools.partial(setup, fault), "carafe") for name, fault in faults.items()]
    with_peer(monkeypatch, *wrong)
    code, record = run([*TINY, "--peers", *faults, "nearest"], tmp_path)
    assert code == 1
    measured = by_name(record["results"][0])
    for name in faults:
        assert measured[name]["forward"]["status"] == "wrong result"
        assert "median_ms" not in measured[name]["forward"]
    assert measured["nearest"]["forward"]["status"] == "ok"


def test_a_wrong_gradient_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(problem: Problem, inputs: Inputs) -> Call:
        call = peers.OURS[0].setup(problem, inputs)
        # The same value, and a gradient of the features that is one too large.
        return Call(
            lambda: call.forward() + (inputs.features.sum() - inputs.features.sum().detach()),
            call.wrt,
            call.grad_output,
        )

    with_peer(monkeypatch, Peer("wrong", "a wrong one", setup, "carafe"))
    code, record = run([*TINY, "--peers", "wrong"], tmp_path)
    wrong = by_name(record["results"][0])["wrong"]
    assert code == 1
    assert wrong["forward"]["status"] == "ok"
    assert wrong["forward_backward"]["status"] == "wrong result"


@pytest.mark.parametrize("stage", ["setup", "call"])
def test_a_peer_that_fails_does_not_end_the_run(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("no such thing in /some/where/file.cpp\nand more")

    def setup(problem: Problem, inputs: Inputs) -> Call:
        if stage == "setup":
            fail()
        return Call(fail, (inputs.features,), inputs.grad_output)

    with_peer(monkeypatch, Peer("broken", "a broken one", setup, "carafe"))
    code, record = run([*TINY, "--peers", "broken", "nearest"], tmp_path)
    measured = by_name(record["results"][0])
    assert code == 0
    for each in ("forward", "forward_backward"):
        assert measured["broken"][each]["status"] == "failed"
        assert measured["broken"][each]["detail"] == "ValueError: no such thing in file.cpp"
        assert measured["nearest"][each]["status"] == "ok"


def test_a_peer_that_is_too_slow_is_told_and_ours_is_measured(tmp_path: Path) -> None:
    code, record = run([*TINY, "--time-limit", "1e-9", "--peers", "bilinear"], tmp_path)
    measured = by_name(record["results"][0])
    assert code == 0
    assert measured["carafe"]["forward"]["status"] == "ok"
    assert measured["bilinear"]["forward"]["status"] == "too slow"
    assert measured["bilinear"]["forward"]["estimate_ms"] > 0


def test_the_memory_limit_ends_with_the_run(tmp_path: Path) -> None:
    run([*TINY, "--memory-limit", "0.08", "--peers", "nearest"], tmp_path)
    torch.ones(50_000_000)


def test_what_is_slow_in_forward_is_not_tried_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def setup(problem: Problem, inputs: Inputs) -> Call:
        def forward() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            return torch.nn.functional.interpolate(inputs.features, scale_factor=2)

        return Call(forward, (inputs.features,), inputs.grad_output)

    # 20 s by the clock for each call that is timed.
    monkeypatch.setattr(measure, "seconds", lambda work, calls=1: (work(), 20.0)[1])
    slow = Peer("slow", "a slow one", setup, "carafe", equal=False)
    result = comparison.Comparison(Problem(2, 3, 4), [slow], time_limit=50).run()
    (record,) = result["peers"]
    assert record["forward"]["detail"] == "one call takes 20 s, all may take 50 s"
    assert record["forward_backward"] == {"status": "too slow", "detail": "the forward pass alone is"}
    assert calls == [False, False]


def test_default_shapes_and_quick(capsys: pytest.CaptureFixture[str]) -> None:
    def sizes(*arguments: str) -> list[tuple[int, ...]]:
        asked = bench_op.parse_arguments([*arguments, "--threads", "1"]).problems
        return [(each.batch, each.channels, each.height, each.width, each.up, each.down) for each in asked]

    up = [(1, 256, 25, 42, 2, 1), (1, 256, 50, 84, 2, 1), (1, 256, 100, 168, 2, 1)]
    down = [(1, 64, 200, 336, 1, 2), (1, 256, 200, 336, 1, 2)]
    assert sizes() == up + down
    assert sizes("--scale-factor", "2") == up
    assert sizes("--scale-factor", "1/2") == down
    assert sizes("--quick") == [up[1], down[0]]
    assert sizes("--shapes", "2x8x3x4", "8x5x6", "--scale-factor", "0.5") == [(2, 8, 3, 4, 1, 2), (1, 8, 5, 6, 1, 2)]
    everything = {peer.name for peer in bench_op.parse_arguments(["--threads", "1"]).peers}
    quick = {peer.name for peer in bench_op.parse_arguments(["--threads", "1", "--quick", "--skip", "nearest"]).peers}
    assert everything - quick == {"shifted-madd-compiled", "steps-compiled", "nearest"}
    asked = bench_op.parse_arguments(
        ["--threads", "1", "--peers", "nearest", "bilinear", "nearest", "--skip", "bilinear"]
    )
    assert [peer.name for peer in asked.peers] == ["nearest"]


def test_command_hides_paths_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "pytorch" / "cuda" / "carafe_cuda.cu"
    source.parent.mkdir(parents=True)
    source.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers.mmcv, "source", None)
    rest = ["--threads", "1", "--memory-limit", "0.08", "--mmcv-source"]
    asked = bench_op.parse_arguments([*rest, ".", "--json", f"{tmp_path}/result.json"])
    assert asked.command == "python -m benchmarks.op --threads 1 --memory-limit 0.08 --mmcv-source . --json result.json"
    asked = bench_op.parse_arguments([*rest, str(tmp_path)])
    assert asked.command.endswith(f" 0.08 --mmcv-source {tmp_path.name}")


def test_ours_failing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(problem: Problem, inputs: Inputs) -> Call:
        raise RuntimeError("broken build")

    monkeypatch.setattr(bench_op, "OURS", (Peer("carafe", "ours", setup, "carafe"),))
    code, record = run([*TINY, "--peers", "nearest"], tmp_path)
    assert code == 1
    assert by_name(record["results"][0])["nearest"]["forward"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "256x50"], "expected CxHxW or NxCxHxW, positive integers such as 256x50x84, got '256x50'"),
        (["--shapes", "4x0x5"], "got '4x0x5'"),
        (["--repeats", "0"], "--repeats: expected a positive int, got '0'"),
        (["--time-limit", "nan"], "--time-limit: expected a positive float, got 'nan'"),
        (["--kernel-size", "4"], "--kernel-size: expected an odd number, got 4"),
        (["--shapes", "6x3x3", "--group-size", "4"], "--group-size: 6 channels cannot be divided into 4 groups"),
        (["--peers", "fastest"], "--peers: invalid choice: 'fastest' (choose from "),
        (["--peers", "max-pool", "--scale-factor", "2"], "--peers: max-pool cannot run: it only downsamples"),
        (["--skip", "fastest"], "--skip: invalid choice: 'fastest' (choose from "),
        (["--scale-factor", "3/2"], "expected an integer such as 2, or one over it such as 1/2, got '3/2'"),
        (["--growth", "depth"], "--growth: invalid choice: 'depth' (choose from "),
        (["--growth", "--peers", "nearest"], "--growth measures ours only: it takes no --peers"),
        (["--mmcv-source", "."], "--mmcv-source: no pytorch/cuda/carafe_cuda.cu in ."),
        (["--peers", "mmcv"], "--peers: mmcv cannot run: mmcv has this operator for CUDA only"),
        (["--threads", "100000"], "--threads: 100000 asked for, "),
        (["--json", "no/such/file.json"], "--json: no folder no/such to write file.json into"),
        (["--json", "."], "--json: expected a file, . is a folder"),
        (["--plot", "plot.txt"], "--plot: expected a name that ends in .png, .svg or .pdf, got 'plot.txt'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_op.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: nothing to complain about")
    with pytest.raises(SystemExit) as stopped:
        bench_op.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err


def test_cuda_run(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    code, record = run(["--device", "cuda", *TINY, "--peers", *EAGER, "nearest"], tmp_path)
    assert code == 0
    for peer in record["results"][0]["peers"]:
        assert peer["forward_backward"]["status"] == "ok"
        assert peer["forward_backward"]["peak_bytes"] > 0
    assert record["machine"]["gpu"]


# ------------------------------------------------------------------------------------ committed results


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
# What the GPU check's own probes found has no tables here: its summary shows it.
PROBED = [file for file in RESULTS if file.stem.endswith(("_graphs", "_limits", "_detector"))]
PREDICTIONS = [file for file in RESULTS if "_gpu-model_" in file.name]


@pytest.mark.parametrize("file", PREDICTIONS, ids=lambda file: file.stem)
def test_committed_predictions_say_that_they_are_none_of_the_measured(file: Path) -> None:
    record = json.loads(file.read_text())
    assert "model" in record
    assert record["source_revision"]
    assert file.with_suffix(".txt").read_text().startswith("Model, not measured") or "compared" in file.name


@pytest.mark.parametrize(
    "file", [file for file in RESULTS if file not in PREDICTIONS + PROBED], ids=lambda file: file.stem
)
def test_committed_results_can_be_shown(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(file.read_text())
    if "models" in record:
        pytest.importorskip("mmengine", reason="mmengine is not installed")
        from benchmarks import model as bench_model

        bench_model.print_table(record)
        if "profile" in record["models"][0]:
            bench_model.print_profile(record["models"])
    elif "exported" in record:
        bench_export.print_tables(record)
    elif "growth" in record:
        bench_op.print_growth(record["growth"], Problem(**bench_op.BASE))
        bench_op.plot_growth(record, tmp_path / "plot.svg")
    else:
        report.print_header(record)
        for result in record["results"]:
            for each in comparison.PASSES:
                report.print_table(result, each)
        report.plot(record, tmp_path / "plot.svg")
    shown = capsys.readouterr().out
    if "exported" in record:
        peers_or_models = record["exported"][0]["rows"]
    else:
        peers_or_models = record.get("models") or (record["results"] or record["growth"])[0]["peers"]
    assert all(each["name"] in shown for each in peers_or_models)


def test_a_cpu_path_that_does_not_exist_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.op", *TINY]
    environment = {**os.environ, "CARAFE_CPU_PATH": "bogus"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: CARAFE_CPU_PATH=bogus is not a path of this machine")
