"""tools/bench_op.py: the peers compute what they say, the record is complete, and nothing that goes wrong is hidden."""

from __future__ import annotations

import gc
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carafe_plugin.ops import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_measure  # noqa: E402
import bench_op  # noqa: E402
import bench_peers  # noqa: E402
from bench_peers import Call, Inputs, Peer, Problem  # noqa: E402

EAGER = ("unfold-einsum", "upsample-unfold", "shifted-madd")
# Whatever ours is built as, a tiny size is enough for all but timings.
TINY = ["--quick", "--threads", "1", "--shapes", "4x3x5"]


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


# ------------------------------------------------------------------------------------------------ the peers


@pytest.mark.parametrize(
    "problem",
    [
        Problem(4, 5, 6),
        Problem(6, 1, 1, group_size=3),
        Problem(8, 7, 3, batch=2, kernel_size=3, group_size=4, up=3),
        Problem(2, 2, 9, kernel_size=7, up=1),
        Problem(3, 4, 4, kernel_size=1, up=4),
    ],
    ids=lambda problem: f"{problem.name}-k{problem.kernel_size}-g{problem.group_size}-up{problem.up}",
)
@pytest.mark.parametrize("name", ["carafe", *EAGER])
def test_peer_computes_the_definition(name: str, problem: Problem) -> None:
    problem = Problem(**{**vars(problem), "dtype": torch.float64})
    inputs = Inputs.random(problem)
    peer = next(peer for peer in (bench_peers.OURS, *bench_peers.PEERS) if peer.name == name)
    call = peer.setup(problem, inputs)
    geometry = problem.kernel_size, problem.group_size, problem.up, 1
    x, m, z = inputs.features.detach(), inputs.masks.detach(), inputs.grad_output
    expected = (
        reference.reassemble(x, m, *geometry),
        reference.grad_features(z, m, problem.height, problem.width, *geometry),
        reference.grad_masks(z, x, *geometry),
    )
    (output,) = bench_op.run_pass(call, inputs, "forward")
    gradients = bench_op.run_pass(call, inputs, "forward_backward")
    assert not output.requires_grad
    for result, value in zip((output, *gradients), expected, strict=True):
        # Sums of at most a few hundred products of order 1, in float64.
        torch.testing.assert_close(result, value, rtol=1e-11, atol=1e-12)


def test_compiled_peer_computes_the_definition() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    # The forward pass alone, with one tap: compiling is what takes the time.
    problem = Problem(2, 3, 5, kernel_size=1)
    inputs = Inputs.random(problem)
    peer = next(peer for peer in bench_peers.PEERS if peer.name == "shifted-madd-compiled")
    (result,) = bench_op.run_pass(peer.setup(problem, inputs), inputs, "forward")
    expected = reference.reassemble(inputs.features.detach(), inputs.masks.detach(), 1, 1, 2, 1)
    torch.testing.assert_close(result, expected)


def test_references_return_the_upsampled_size_and_differentiate_what_they_use() -> None:
    problem = Problem(4, 3, 5, up=3)
    inputs = Inputs.random(problem)
    others = [peer for peer in bench_peers.PEERS if not peer.equal]
    assert {peer.name for peer in others} == {"nearest", "bilinear", "deconvolution"}
    for peer in others:
        call = peer.setup(problem, inputs)
        assert call.forward().shape == inputs.grad_output.shape
        gradients = bench_op.run_pass(call, inputs, "forward_backward")
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in call.wrt]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_bound_counts_what_the_design_counts() -> None:
    problem = Problem(256, 50, 84)
    assert problem.flop(backward=False) == 2 * 256 * 100 * 168 * 25  # 0.215 GFLOP
    assert problem.flop(backward=True) == 3 * problem.flop(backward=False)
    features, masks, output = (tensor.nbytes for tensor in vars(Inputs.random(problem)).values())
    assert problem.traffic(backward=False) == features + masks + output
    assert problem.traffic(backward=True) == 3 * features + 3 * masks + 2 * output


# --------------------------------------------------------------------------------------------- measurements


def test_interleaving_takes_turns() -> None:
    turns: list[str] = []

    def work(name: str) -> Callable[[], None]:
        return lambda: turns.append(name)

    # An estimate of a second: one call a sample, none to warm up.
    timings = [bench_measure.Timing(work(name), 1.0, repeats) for name, repeats in (("a", 3), ("b", 3), ("c", 1))]
    bench_measure.interleave(timings, "cpu")
    assert turns == ["a", "b", "c", "a", "b", "a", "b"]
    summary = timings[0].summary()
    assert summary["min_ms"] <= summary["q1_ms"] <= summary["median_ms"] <= summary["q3_ms"] <= summary["max_ms"]


def test_peak_counts_every_byte_and_what_was_released() -> None:
    def work() -> torch.Tensor:
        temporary = torch.ones(1000, 1000)
        result = temporary[:500].clone()
        del temporary
        return result + 1  # 2 MB beside 2 MB: less than the 6 MB before

    assert bench_measure.peak_bytes(work, "cpu") == 6_000_000


def test_peak_of_ours_is_no_multiple_of_its_tensors_and_hides_nothing() -> None:
    from carafe_plugin import is_compiled

    if not is_compiled("cpu"):
        pytest.skip("the compiled operator is not built; the PyTorch reference needs more memory, by its nature")
    problem = Problem(64, 50, 84)
    inputs = Inputs.random(problem)
    call = bench_peers.OURS.setup(problem, inputs)

    def work() -> object:
        return bench_op.run_pass(call, inputs, "forward")

    work()
    counted = bench_measure.peak_bytes(work, "cpu")
    assert (
        inputs.grad_output.nbytes <= counted <= inputs.features.nbytes + inputs.masks.nbytes + inputs.grad_output.nbytes
    )

    # The system's own count, where it can be reset, shows memory that does not come from torch's allocator.
    if platform.system() != "Linux":
        pytest.skip("only Linux can reset the peak of the resident memory")
    gc.collect()
    try:
        before = bench_measure._kibibytes("/proc/self/status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of the resident memory cannot be reset here: {error}")
    result = work()
    resident = bench_measure._kibibytes("/proc/self/status", "VmHWM") - before
    del result
    assert resident <= counted + 3e6  # pages, malloc's slack


# ------------------------------------------------------------------------------------------------ the record


def test_record_is_complete_and_names_no_place(tmp_path: Path) -> None:
    plot = tmp_path / "result.svg"
    arguments = [*TINY, "6x4x4", "--group-size", "2", "--peers", *EAGER, "bilinear", "--plot", str(plot)]
    code, report = run(arguments, tmp_path)
    assert code == 0
    assert plot.read_text().count("<svg") == 1
    assert {"schema", "command", "date", "revision", "version", "backend", "machine", "results"} <= set(report)
    assert {"cpu", "cores", "threads", "instruction_set", "torch", "python"} <= set(report["machine"])
    assert report["machine"]["threads"] == 1
    text = json.dumps(report)
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert platform.node() not in text
    assert report["command"].endswith("--plot result.svg --json result.json")

    assert [result["shape"]["channels"] for result in report["results"]] == [4, 6]
    for result in report["results"]:
        peers = by_name(result)
        assert list(peers) == ["carafe", *EAGER, "bilinear"]
        for each in ("forward", "forward_backward"):
            assert result["bound"][f"{each}_ms"] > 0
            ours = peers["carafe"][each]["median_ms"]
            for name, peer in peers.items():
                values = peer[each]
                assert values["status"] == "ok"
                assert 0 < values["min_ms"] <= values["q1_ms"] <= values["median_ms"]
                assert values["median_ms"] <= values["q3_ms"] <= values["max_ms"]
                assert len(values["samples_ms"]) == values["repeats"] == 2
                assert values["times_ours"] == pytest.approx(values["median_ms"] / ours, abs=1e-4)
                bound = result["bound"][f"{each}_ms"]
                assert values["times_bound"] == pytest.approx(values["median_ms"] / bound, rel=1e-3, abs=1e-4)
                assert values["peak_bytes"] >= 4 * result["shape"]["channels"] * 16
                assert ("error" in values) == (name in EAGER)


def test_quick_run_from_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench_op.py"), *TINY, "--peers", "shifted-madd", "nearest"]
    command += ["--json", "result.json", "--plot", "result.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "shifted-madd" in done.stdout
    assert "forward + backward" in done.stdout
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "result.json").read_text())["results"][0]["shape"]["width"] == 5


# ------------------------------------------------------------------------------------ what can go wrong


def with_peer(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    monkeypatch.setattr(bench_op, "PEERS", (*bench_peers.PEERS, peer))


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y[..., :-1], lambda y: y * float("nan")])
def test_a_wrong_result_is_told_and_not_timed(
    wrong: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setup(problem: Problem, inputs: Inputs) -> Call:
        call = bench_peers.OURS.setup(problem, inputs)
        return Call(lambda: wrong(call.forward()), call.wrt)

    with_peer(monkeypatch, Peer("wrong", "a wrong one", setup))
    code, report = run([*TINY, "--peers", "wrong", "nearest"], tmp_path)
    assert code == 1
    peers = by_name(report["results"][0])
    assert peers["wrong"]["forward"]["status"] == "wrong result"
    assert "median_ms" not in peers["wrong"]["forward"]
    assert peers["nearest"]["forward"]["status"] == "ok"


def test_a_wrong_gradient_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(problem: Problem, inputs: Inputs) -> Call:
        call = bench_peers.OURS.setup(problem, inputs)
        # The same value, and a gradient of the features that is one too large.
        return Call(lambda: call.forward() + (inputs.features.sum() - inputs.features.sum().detach()), call.wrt)

    with_peer(monkeypatch, Peer("wrong", "a wrong one", setup))
    code, report = run([*TINY, "--peers", "wrong"], tmp_path)
    wrong = by_name(report["results"][0])["wrong"]
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
        return Call(fail, (inputs.features,))

    with_peer(monkeypatch, Peer("broken", "a broken one", setup))
    code, report = run([*TINY, "--peers", "broken", "nearest"], tmp_path)
    peers = by_name(report["results"][0])
    assert code == 0
    for each in ("forward", "forward_backward"):
        assert peers["broken"][each]["status"] == "failed"
        assert peers["broken"][each]["detail"] == "ValueError: no such thing in file.cpp"
        assert peers["nearest"][each]["status"] == "ok"


def test_a_peer_that_is_too_slow_is_told_and_ours_is_measured(tmp_path: Path) -> None:
    code, report = run([*TINY, "--time-limit", "1e-9", "--peers", "bilinear"], tmp_path)
    peers = by_name(report["results"][0])
    assert code == 0
    assert peers["carafe"]["forward"]["status"] == "ok"
    assert peers["bilinear"]["forward"]["status"] == "too slow"
    assert peers["bilinear"]["forward"]["estimate_ms"] > 0


@pytest.mark.skipif(platform.system() != "Linux", reason="memory can be limited on Linux alone")
def test_a_peer_that_runs_out_of_memory_is_told(tmp_path: Path) -> None:
    # 105 MB unfolded where 80 may be allocated; the output has 4. In a process of its own: what an earlier test has
    # freed would serve without counting as new.
    arguments = ["--quick", "--shapes", "64x64x64", "--memory-limit", "0.08", "--threads", "1"]
    arguments += ["--peers", "upsample-unfold", "nearest", "--json", "result.json"]
    command = [sys.executable, bench_op.__file__, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peers = by_name(json.loads((tmp_path / "result.json").read_text())["results"][0])
    assert peers["upsample-unfold"]["forward"]["status"] == "out of memory"
    assert peers["nearest"]["forward"]["status"] == "ok"


def test_the_memory_limit_ends_with_the_run(tmp_path: Path) -> None:
    run(["--quick", "--shapes", "4x4x4", "--memory-limit", "0.08", "--peers", "nearest"], tmp_path)
    torch.ones(50_000_000)


def test_ours_failing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(problem: Problem, inputs: Inputs) -> Call:
        raise RuntimeError("broken build")

    monkeypatch.setattr(bench_op, "OURS", Peer("carafe", "ours", setup))
    code, report = run([*TINY, "--peers", "nearest"], tmp_path)
    assert code == 1
    assert by_name(report["results"][0])["nearest"]["forward"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "256x50"], "--shapes: expected CxHxW, three positive integers such as 256x50x84, got '256x50'"),
        (["--shapes", "4x0x5"], "got '4x0x5'"),
        (["--repeats", "0"], "--repeats: expected a positive int, got '0'"),
        (["--time-limit", "nan"], "--time-limit: expected a positive float, got 'nan'"),
        (["--kernel-size", "4"], "--kernel-size: expected an odd number, got 4"),
        (["--shapes", "6x3x3", "--group-size", "4"], "--group-size: 6 channels cannot be divided into 4 groups"),
        (["--peers", "fastest"], "--peers: unknown peer 'fastest'; known are unfold-einsum, "),
        (["--peers", "mmcv"], "--peers: mmcv cannot run: mmcv has this operator for CUDA alone"),
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
    code, report = run(["--device", "cuda", "--quick", "--peers", *EAGER, "nearest"], tmp_path)
    assert code == 0
    for peer in report["results"][0]["peers"]:
        assert peer["forward_backward"]["status"] == "ok"
        assert peer["forward_backward"]["peak_bytes"] > 0
    assert report["machine"]["gpu"]
