"""benchmarks/gpu_check.py: every step runs whatever the others do, and its checks find faults. No GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
import torch
from toolkit import reason_for_no_cuda_half

from benchmarks import gpu_build, gpu_check, gpu_probes, gpu_reports, gpu_steps, mmcv_operator
from benchmarks import module as bench_module
from benchmarks import op as bench_op
from benchmarks.gpu_steps import Step

pytestmark = pytest.mark.usefixtures("one_thread")


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


FINE = Step("fine", python("import os, sys; print(sys.argv[1], os.environ['PYTHONPATH'])", "{out}"), 60)
BROKEN = Step("broken", python("print('before', flush=True); raise SystemExit('it is broken')"), 60)
SLOW = Step("slow", python("import time; print('start', flush=True); time.sleep(60)"), 3)


# --------------------------------------------------------------------------------------------------- steps


@pytest.mark.skipif(reason_for_no_cuda_half() is not None, reason=reason_for_no_cuda_half() or "")
def test_a_dry_run_rehearses_every_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", str(out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # seven processes begin at the same time
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=one_thread, capture_output=True, text=True)
    summary = json.loads((out / "summary.json").read_text())
    steps = {step["name"]: step for step in summary["steps"]}
    told = {name: (step["status"], step.get("detail")) for name, step in steps.items()}
    assert done.returncode == 0, f"{told}\n{done.stderr[-2000:]}"
    assert summary["dry_run"]
    real = {step.name for group in gpu_steps.all_steps(tmp_path) for step in group}
    assert {name.split("-up-")[0] for name in real} == {name.removesuffix("-up") for name in steps}
    assert all(step["rehearsed"] for step in steps.values())
    skipped = [name for name, (status, _) in told.items() if status != "ok"]
    assert skipped in ([], ["compile-model", "model"])
    assert all("there is no" in str(told[name]) for name in skipped)
    assert told["counters"][1] == "6 kernels of 2 calls"
    assert told["memcheck"][1] == "0 errors"
    assert told["racecheck"][1] == "0 hazards"
    assert told["limits"][1].startswith("ours right in 3 of 3 cases")
    assert told["streams"][1] == "32 of 32 the same bits"
    assert told["tests"][1].startswith("0 passed, 0 failed")
    for half in ("cpu", "cuda"):
        assert json.loads((out / f"build-{half}.json").read_text())["ok"]
    readable = (out / "summary.md").read_text()
    assert "| 8x6x8 1/2, bfloat16, forward_backward |" in readable
    assert readable.count("; rehearsed ") + readable.count("| rehearsed ") == len(steps)


def test_a_step_goes_on_until_the_last_group(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    groups = [
        [
            Step(
                "behind",
                ["sh", "-c", f"while [ ! -e {flag}.seen ]; do sleep 0.1; done; touch {flag}; echo done"],
                60,
                goes_on=True,
            )
        ],
        [Step("beside", ["sh", "-c", f"[ ! -e {flag} ] && touch {flag}.seen && echo done"], 60)],
        [Step("last", ["sh", "-c", f"[ -e {flag} ] && echo done"], 60)],
    ]
    records = gpu_check.run_all(groups, tmp_path, 120.0)
    assert [(record["name"], record["status"]) for record in records] == [
        ("behind", "ok"),
        ("beside", "ok"),
        ("last", "ok"),
    ]


def test_steps_go_on_after_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Step("absent", ["no-such-program"], 60)
    skipped = Step("skipped", [], 60, missing="no such tool")
    monkeypatch.setattr(gpu_check, "all_steps", lambda source, dry: [[BROKEN, SLOW], [absent], [skipped], [FINE]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(mmcv_operator, "architecture", lambda: "9.0")
    out = tmp_path / "out"
    assert gpu_check.main(["--out", str(out)]) == 1
    steps = {step["name"]: step for step in json.loads((out / "summary.json").read_text())["steps"]}
    assert {name: (step["status"], step["code"]) for name, step in steps.items()} == {
        "broken": ("failed", 1),
        "slow": ("timed out", None),
        "absent": ("failed", None),
        "skipped": ("skipped", None),
        "fine": ("ok", 0),
    }
    assert steps["slow"]["seconds"] < 30
    assert steps["broken"]["detail"] == "it is broken"
    assert steps["slow"]["detail"] == "start"
    assert "no-such-program" in steps["absent"]["detail"]
    assert steps["skipped"]["detail"] == "no such tool"
    assert "detail" not in steps["fine"]
    assert (out / "broken.log").read_text().splitlines()[1] == "before"
    last = (out / "fine.log").read_text().splitlines()[-1]
    assert last.startswith(f"{out} {gpu_check.ROOT}")  # {out} is the folder; this checkout's package is found
    assert not (out / "skipped.log").exists()
    readable = (out / "summary.md").read_text()
    assert "| broken | failed | 0 | it is broken |" in readable

    assert gpu_check.main(["--out", str(out), "--only", "fine", "skipped"]) == 0
    assert [step["name"] for step in json.loads((out / "summary.json").read_text())["steps"]] == ["skipped", "fine"]


def test_no_step_outlives_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcv_operator, "architecture", lambda: "9.0")
    record = gpu_check.run_step(FINE, tmp_path, time.monotonic() + 0.5)
    assert (record["status"], record["detail"]) == ("skipped", "no time is left")
    lock = tmp_path / "extensions" / "peer" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()  # as a killed compilation leaves it
    unlimited = Step("slow", SLOW.command, 60)
    record = gpu_check.run_step(unlimited, tmp_path, time.monotonic() + 1.5)
    assert record["status"] == "timed out"
    assert record["seconds"] < 30
    assert not lock.exists()


def test_an_interruption_ends_the_steps_too(tmp_path: Path) -> None:
    """Ctrl-C reaches the check alone: its steps are process groups of their own."""
    code = """
import sys, torch
from pathlib import Path
from benchmarks import gpu_check, mmcv_operator
from benchmarks.gpu_steps import Step
gpu_check.working_compiler = lambda: None
note = "import os, sys, time; open(sys.argv[1] + '/' + str(os.getpid()), 'w').close(); time.sleep(600)"
step = Step("slow", [sys.executable, "-S", "-c", note, "{out}"], 600)
gpu_check.all_steps = lambda source, dry: [[step, Step("other", step.command, 600)]]
gpu_check.prepare_rehearsal = lambda out: (out / "pids").mkdir()
step.command[-1] = "{out}/pids"
sys.exit(gpu_check.main(["--dry-run", "--out", sys.argv[1]]))
"""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], cwd=gpu_check.ROOT, stdout=subprocess.PIPE
    ) as process:
        for _ in range(600):
            pids = [int(path.name) for path in (out / "pids").glob("*")]
            if len(pids) == 2:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; what was found is in" in said
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def words_after(command: list[str], tool: str, out: Path) -> list[str]:
    return [word.replace("{out}", str(out)) for word in command[list(command).index(tool) + 1 :]]


def test_steps_name_tools_options_and_probes_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / mmcv_operator.LAUNCHERS
    source.parent.mkdir(parents=True)
    source.touch()
    steps = {step.name: step for group in gpu_steps.all_steps(tmp_path) for step in group}
    assert list(steps)[:3] == ["build-cuda", "build-cpu", "mmcv"]
    order = ["tests", "memcheck", "racecheck", "limits", "streams", "graphs", "op-float32", "counters-raw", "counters"]
    assert [name for name in steps if name in order] == order
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    parsers: dict[str, Callable] = {tool.__name__: tool.parse_arguments for tool in (bench_op, bench_module)}
    read, warmed, measured = [], [], None
    for step in steps.values():
        tool = next((word for word in step.command if word in parsers), None)
        if tool:
            asked = parsers[tool](words_after(step.command, tool, tmp_path))
            names = {peer.name for peer in asked.peers}
            assert asked.device == "cuda"
            if step.name.startswith("warm-up"):
                assert names == {"shifted-madd-compiled"}
                warmed += asked.problems
                continue
            assert names & {"mmcv", "pack-mmcv"}
            if step.name == "op-float32":
                measured = asked.problems
            read.append((step.name, names & {"shifted-madd-compiled", "pack-compiled"}))
        elif "benchmarks.gpu_probes" in step.command:
            assert step.command[step.command.index("benchmarks.gpu_probes") + 1] in gpu_probes.PROBES
    assert read == [("op-float32", {"shifted-madd-compiled"}), ("op-float16", set()), ("module-float32", set())]
    assert warmed == measured  # what is compiled beforehand is what is measured
    missing = {step.name: step.missing for group in gpu_steps.all_steps(None) for step in group}
    assert missing["mmcv"] == "no source of mmcv: --mmcv-source names it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "--only: unknown step 'everything'; known are build-cuda, build-cpu, mmcv"),
        (["--budget", "0"], "--budget: expected a positive number of seconds, got 0"),
        (["--mmcv-source", "tools"], "--mmcv-source: no pytorch/cuda/carafe_cuda.cu in tools"),
        (["--dry-run", "--out", __file__], f"--out: expected a folder or a place for one, got {__file__}: File exists"),
        (["--dry-run", "--out", f"{__file__}/out"], "test_gpu_check.py/out: Not a directory"),
        ([], "needs a CUDA device, torch sees none"),
    ],
)
def test_mistakes_and_a_missing_gpu_end_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_results_of_an_earlier_run_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcv_operator, "architecture", lambda: "9.0")
    write = python("import sys; open(sys.argv[1], 'w').write('{\"ok\": true}')", "{out}/compiled.json")
    deadline = time.monotonic() + 60
    assert gpu_check.run_step(Step("compiled", write, 60), tmp_path, deadline)["status"] == "ok"
    record = gpu_check.run_step(Step("compiled", python("pass"), 60), tmp_path, deadline)
    assert record["status"] == "failed"  # although it ended with 0
    assert record["detail"].startswith("no result: FileNotFoundError")


def test_a_rehearsal_shows_options_that_a_tool_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(mmcv_operator, "architecture", lambda: "9.0")
    for says, status in (("Error: unrecognised option '--kernel-regex'", "failed"), ("nothing ran on a GPU", "ok")):
        tool.write_text(f'#!/bin/sh\necho "{says}"\nexit 1\n')
        tool.chmod(0o755)
        steps = {step.name: step for group in gpu_steps.all_steps(None, dry=True) for step in group}
        done = python(
            "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"ok\": true}')", "{out}/racecheck.json"
        )
        command = [*steps["racecheck"].command[:4], *done]
        record = gpu_check.run_step(
            dataclasses.replace(steps["racecheck"], command=command), tmp_path, time.monotonic() + 60
        )
        assert record["status"] == status, record
        assert "compute-sanitizer over a program without a GPU" in record["rehearsed"]


# -------------------------------------------------------------------------------------------------- building


def test_a_compiler_that_links_its_own_cpp_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    static = "g++ -static-libstdc++"
    assert gpu_build.try_out(gpu_build.Compiler(static)) == "it does not share libstdc++.so.6 with torch"
    assert "No such file" in str(gpu_build.try_out(gpu_build.Compiler("no-such-compiler")))
    assert "exit code" in str(gpu_build.try_out(gpu_build.Compiler("g++ --no-such-option")))
    monkeypatch.setenv("CXX", static)
    found = list(gpu_build.candidates())
    assert found[0].command == static
    last = next(each for each in reversed(found) if each.command == static)
    assert last.variables["LDFLAGS"]  # by torch's own library it works
    assert gpu_build.try_out(last) is None


def test_the_next_compiler_builds_where_a_built_library_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compilers = [gpu_build.Compiler(name) for name in ("first", "second")]
    monkeypatch.setattr(gpu_build, "candidates", lambda: iter(compilers))
    monkeypatch.setattr(gpu_build, "try_out", lambda compiler: None)
    monkeypatch.setattr(gpu_build, "build", lambda half, compiler, root: "bad" if compiler.command == "first" else None)
    file = tmp_path / "build-cuda.json"
    assert gpu_build.main(["cuda", "--root", str(tmp_path), "--json", str(file)]) == 0
    assert gpu_reports.read(tmp_path, "build-cuda")[1].startswith("second for")
    assert "first: bad" in capsys.readouterr().out
    del compilers[1]
    assert gpu_build.main(["cuda", "--root", str(tmp_path), "--json", str(file)]) == 1
    assert gpu_reports.read(tmp_path, "build-cuda") == (False, "first: bad")


# -------------------------------------------------------------------------------------------------- reading results


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", (True, "0 errors")),
        ("========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 3 errors", (False, "3 errors")),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", (False, "2 hazards")),
        ("", (False, "no result: ValueError: compute-sanitizer ended without a summary")),
    ],
)
def test_what_compute_sanitizer_says_is_read(log: str, expected: tuple[bool, str], tmp_path: Path) -> None:
    (tmp_path / "memcheck.json").write_text('{"ok": true}')
    (tmp_path / "memcheck.log").write_text(f"========= COMPUTE-SANITIZER\n{log}\n")
    assert gpu_reports.read(tmp_path, "memcheck") == expected
    (tmp_path / "memcheck.log").write_text(log)
    assert gpu_reports.read(tmp_path, "memcheck")[1] == "no result: ValueError: compute-sanitizer did not run"


def test_the_profilers_kernels_are_counted_to_their_calls(tmp_path: Path) -> None:
    recorded = (gpu_steps.RECORDED / "counters-raw.csv").read_text()
    calls = json.loads((gpu_steps.RECORDED / "counters-raw.json").read_text())["calls"]
    rows = gpu_reports.tabulate(recorded, calls).splitlines()
    assert [row.split(",")[0] for row in rows[2:]] == 3 * calls[:1] + 3 * calls[1:]
    assert rows[2].split(",")[-9:-6] == ["27360", "7856200", "1527296"]  # ns, instructions, bytes, without commas
    # With the kernel that divides them, calls may have different numbers of kernels.
    lines = recorded.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith('"ID"')) + 2
    divider = lines[head].split('","')
    divider[4] = "void unnamed>::spin_kernel(T1)"
    spin = '","'.join(divider)
    divided = [*lines[:head], spin, *lines[head : head + 2], spin, *lines[head + 2 :]]
    rows = gpu_reports.tabulate("\n".join(divided), calls).splitlines()
    assert [row.split(",")[0] for row in rows[2:]] == 2 * calls[:1] + 4 * calls[1:]
    with pytest.raises(ValueError, match="saw 2 of 3 calls"):
        gpu_reports.tabulate("\n".join(divided), [*calls, "another"])
    with pytest.raises(ValueError, match="no table, but: ==ERROR== no permission"):
        gpu_reports.tabulate("==PROF== Connected\n==ERROR== no permission", calls)
    assert (
        gpu_reports.main(["counters", str(tmp_path / "absent"), str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    )


def test_failed_tests_are_named(tmp_path: Path) -> None:
    case = '<testcase classname="tests.ops.test_a" name="test_{}">{}</testcase>'
    cases = case.format("right", "") + case.format("wrong", "<failure/>") + case.format("absent", "<skipped/>")
    suite = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">{}</testsuite></testsuites>'
    (tmp_path / "tests.xml").write_text(suite.format(cases))
    assert gpu_reports.read(tmp_path, "tests") == (False, "1 passed, 1 failed, 1 skipped: test_a::test_wrong")


def test_a_benchmark_with_a_wrong_result_is_not_sound(tmp_path: Path) -> None:
    fine, wrong = {"status": "ok", "times_bound": 1.25}, {"status": "wrong result", "detail": "differs"}
    peers = [
        {"name": "carafe", "reference": "carafe", "forward": fine, "forward_backward": fine},
        {"name": "mmcv", "reference": "carafe", "forward": fine, "forward_backward": fine},
    ]
    result = {"results": [{"shape": {"channels": 8, "height": 2, "width": 3}, "peers": peers}]}
    (tmp_path / "op-float32.json").write_text(json.dumps(result))
    assert gpu_reports.read(tmp_path, "op-float32") == (True, "8x2x3 1.2, 1.2")
    peers[1]["forward"] = wrong
    (tmp_path / "op-float32.json").write_text(json.dumps(result))
    assert gpu_reports.read(tmp_path, "op-float32") == (False, "mmcv: differs")


# -------------------------------------------------------------------------------------------------- probes


CPU = gpu_probes.Run("cpu", tiny=True)


def test_small_probe_is_right_on_the_cpu_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probes, "SMALL_SCALES", (Fraction(2), Fraction(1, 2)))
    assert gpu_probes.small(CPU)["ok"]
    right = gpu_probes.reassemble_logits
    monkeypatch.setattr(gpu_probes, "reassemble_logits", lambda *arguments: right(*arguments) * 1.01)
    assert not gpu_probes.small(CPU)["ok"]


class AsIfOnGpu(gpu_probes.Run):
    on_gpu = True  # type: ignore[assignment]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """torch.cuda's names with their signatures, and nothing behind them."""
    calls = mock.Mock()
    for name in ("Stream", "Event", "CUDAGraph", "current_stream", "synchronize", "empty_cache", "_sleep"):
        stand_in = mock.create_autospec(getattr(torch.cuda, name))
        calls.attach_mock(stand_in, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("stream", "graph"):
        stand_in = mock.create_autospec(getattr(torch.cuda, name))
        stand_in.return_value.__exit__.return_value = None
        calls.attach_mock(stand_in, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return calls


def test_what_a_gpu_is_told_has_the_names_and_arguments_that_torch_knows(cuda: mock.Mock) -> None:
    """The lines that a dry run leaves out."""
    work = mock.Mock(return_value=(torch.ones(2),))
    replay, results = gpu_probes.capture(work, on_gpu=True)
    assert work.call_count == 2 + gpu_probes.CALLS
    graph = cuda.CUDAGraph.return_value
    cuda.graph.assert_called_once_with(graph)
    order = [name for name, *_ in cuda.mock_calls]
    assert order.index("Stream().wait_stream") < order.index("stream().__enter__") < order.index("graph().__enter__")
    replay()
    graph.replay.assert_called_once_with()
    assert results is work.return_value

    cuda.Event.return_value.elapsed_time.return_value = 6.0
    assert gpu_probes.milliseconds(mock.Mock(), 3, on_gpu=True) == 2.0
    assert cuda.Event.call_args == mock.call(enable_timing=True)

    assert gpu_probes.streams(AsIfOnGpu("cpu"))["ok"]  # as calls come, so they are done
    cuda._sleep.assert_called_with(200_000_000)
    slept = len(cuda._sleep.call_args_list)
    assert gpu_probes.counters(AsIfOnGpu("cpu", tiny=True))["ok"]
    assert cuda._sleep.call_args_list[slept:] == 12 * [mock.call(1)]
    record = gpu_probes.graphs(AsIfOnGpu("cpu", tiny=True))
    assert not record["ok"]  # nothing is replayed
    peers = [peer for measured in record["measured"] for peer in measured["peers"]]
    assert {peer["detail"] for peer in peers} == {"ValueError: a replayed graph leaves elements unwritten"}


def test_graphs_probe_finds_other_values_and_unwritten_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = gpu_probes.problems(CPU, torch.float32)[0]
    inputs = gpu_probes.Inputs.random(problem)
    call = gpu_probes.OURS[0].setup(problem, inputs)
    right = gpu_probes.capture

    def wrong(work: Callable, on_gpu: bool) -> tuple:
        replay, results = right(work, on_gpu)
        return (lambda: (replay(), results[0].view(-1)[:1].add_(1))), results

    def idle(work: Callable, on_gpu: bool) -> tuple:
        return (lambda: None), right(work, on_gpu)[1]

    gpu_probes.checked_replay(call, "forward", False, same_bits=True)
    monkeypatch.setattr(gpu_probes, "capture", wrong)
    with pytest.raises(ValueError, match="other values than an eager call"):
        gpu_probes.checked_replay(call, "forward", False, same_bits=True)
    monkeypatch.setattr(gpu_probes, "capture", idle)
    with pytest.raises(ValueError, match="leaves elements unwritten"):
        gpu_probes.checked_replay(call, "forward", False, same_bits=False)
    peer = gpu_probes.OURS[0]
    rates = {"copy_bytes_per_s": 1e9, "matmul_flop_per_s": 1e9}
    record = gpu_probes.graphs_of(CPU, problem, [peer], inputs, "forward", rates)
    assert record["peers"][0]["status"] == "failed"


def test_streams_probe_finds_work_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = gpu_probes.stream_step, []

    def late(*arguments: object) -> tuple:
        calls.append(arguments)
        results = right(*arguments)
        return tuple(each + (len(calls) == 6) for each in results)  # the second after the four that are expected

    monkeypatch.setattr(gpu_probes, "stream_step", late)
    result = gpu_probes.streams(CPU)
    assert [name for name, same in result["checks"].items() if not same] == ["late inputs: masks, 2/1, float32"]
    assert not result["ok"]


@pytest.mark.parametrize("limit", [limit for limit in gpu_probes.LIMITS[::3]], ids=lambda limit: limit.name)
def test_limits_probe_finds_a_fault_in_any_result(limit: gpu_probes.Limit) -> None:
    """An error in the rows that are compared, of the output or either gradient."""

    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output: torch.Tensor, features: torch.Tensor, masks: torch.Tensor, what: int) -> torch.Tensor:
            ctx.what, ctx.like = what, (features, masks)
            return output * (1.5 if what == 0 else 1)

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> tuple:
            extra = [torch.ones_like(like) if ctx.what == number else None for number, like in enumerate(ctx.like, 1)]
            return (grad, *extra, None)

    def function(x: torch.Tensor, m: torch.Tensor, k: int, g: int, up: int, down: int) -> torch.Tensor:
        return Faulty.apply(gpu_probes.carafe(x, m, k, g, Fraction(up, down)), x, m, what)

    for what in range(-1, 3):
        errors = gpu_probes.limit_errors(CPU, limit, function)
        wrong = [error > gpu_probes.TOLERANCES[limit.dtype] for error in errors]
        assert wrong == [number == what for number in range(3)]
    assert gpu_probes.verdict([0.0, float("nan"), 0.0], limit).startswith("wrong")


def test_what_ends_mmcvs_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probes.sys, "executable", "false")
    assert gpu_probes.run_mmcv(CPU, gpu_probes.LIMITS[0]) == "ends its process with 1"


def test_detector_neck_is_torchvisions_but_for_the_upsampler() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    neck = ops.FeaturePyramidNetwork([4, 8, 16], 8, extra_blocks=LastLevelMaxPool())
    ours = gpu_probes.UpsamplingFPN(neck, 8)
    outputs = ours({"a": torch.rand(1, 4, 7, 9), "b": torch.rand(1, 8, 4, 5), "c": torch.rand(1, 16, 2, 3)})
    sizes = {name: tuple(each.shape[1:]) for name, each in outputs.items()}
    assert sizes == {"a": (8, 7, 9), "b": (8, 4, 5), "c": (8, 2, 3), "pool": (8, 1, 2)}
    sum(each.sum() for each in outputs.values()).backward()
    assert all(each.grad is not None for each in ours.upsamplers.parameters())

    for upsampler in ours.upsamplers:
        gpu_probes.as_nearest(upsampler)
    even = {"a": torch.rand(1, 4, 12, 16), "b": torch.rand(1, 8, 6, 8), "c": torch.rand(1, 16, 3, 4)}
    for (name, expected), (own, got) in zip(neck(even).items(), ours(even).items(), strict=True):
        assert name == own
        torch.testing.assert_close(got, expected)


def test_probe_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "environment.json"
    assert gpu_probes.main(["environment", "--device", "cpu", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["machine"]["torch"] == torch.__version__
    assert gpu_probes.main(["compiled", "--device", "meta"]) == 1
    assert '"ok": false' in capsys.readouterr().out
