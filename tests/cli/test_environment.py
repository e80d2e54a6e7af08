"""Environment variables, terminals and start-up."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from mergebench.cli.main import app
from tests.helpers.files import F16, listing, read
from tests.helpers.running import (
    COMMAND,
    Ran,
    assert_done,
    assert_refused,
    call,
    clean_environment,
    command,
)
from tests.helpers.running import python as run_python
from tests.helpers.scene import Scene

TIES = ("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "out")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38|48)[0-9;]*m")


def on_a_terminal(
    *args: str, scene: Scene, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and what a terminal shows."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [COMMAND, *args],
        cwd=scene.path,
        env=clean_environment({"TERM": "xterm-256color", **(env or {})}),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    return process.returncode, shown.decode()


def test_memory_from_the_environment(scene: Scene) -> None:
    """MERGEBENCH_MEMORY sets the limit, and --memory wins over it."""
    env = {"MERGEBENCH_MEMORY": "1MiB"}

    refused = call(*TIES, cwd=scene.path, env=env)
    assert_refused(refused, "needs at least", "--memory 1 MiB")
    assert "out" not in listing(scene.path)
    assert_done(call(*TIES, "--memory", "512MiB", cwd=scene.path, env=env))


def test_other_options_from_the_environment(scene: Scene) -> None:
    """Dtype, shard size, workers and quietness have variables below their flags."""
    env = {
        "MERGEBENCH_DTYPE": "f16",
        "MERGEBENCH_SHARD_SIZE": "2kB",
        "MERGEBENCH_WORKERS": "1",
        "MERGEBENCH_QUIET": "1",
    }
    plan = ("plan", *TIES[1:], "--json")

    quiet = assert_done(call(*TIES, cwd=scene.path, env=env))
    workers = assert_done(call(*plan, cwd=scene.path, env=env)).json["workers"]
    flags = assert_done(
        call(*TIES[:-1], "two", "--dtype", "f32", "--shard-size", "1GB", cwd=scene.path, env=env)
    )

    assert (quiet.out, flags.out) == ("", "")
    assert read(scene.path / "out")["model.norm.weight"].dtype == F16
    assert "model.safetensors.index.json" in listing(scene.path / "out")
    assert (
        read(scene.path / "two")["model.norm.weight"].dtype == scene.base["model.norm.weight"].dtype
    )
    assert "model.safetensors.index.json" not in listing(scene.path / "two")
    assert workers == 1


def test_kernels_are_chosen_by_flag_or_environment(scene: Scene) -> None:
    """The same bytes with compiled code and without; the flag wins over the variable."""
    ties = (*TIES[:-1], "plain")
    assert_done(call(*ties, "--kernels", "off", cwd=scene.path))
    assert_done(call(*TIES, cwd=scene.path, env={"MERGEBENCH_KERNELS": "on"}))
    assert_done(
        call(*TIES, "--force", "--kernels", "on", cwd=scene.path, env={"MERGEBENCH_KERNELS": "off"})
    )
    plain, compiled = (
        (scene.path / name / "model.safetensors").read_bytes() for name in ("plain", "out")
    )
    assert plain[-1000:] == compiled[-1000:]
    refused = call(*TIES, "--force", "--kernels", "fast", cwd=scene.path)
    assert_refused(refused, "--kernels", "auto, on")
    refused = call(*TIES, "--force", cwd=scene.path, env={"MERGEBENCH_KERNELS": "fast"})
    assert_refused(refused, "--kernels", "auto, on")


def test_wrong_value_in_the_environment(scene: Scene) -> None:
    """A variable with a value that makes no sense is refused like the flag."""
    for name, value, words in (
        ("MEMORY", "lots", ("--memory", "'lots'")),
        ("DTYPE", "bf17", ("--dtype", "'bf16'?")),
        ("WORKERS", "-2", ("--workers", "MERGEBENCH_WORKERS")),
    ):
        assert_refused(call(*TIES, cwd=scene.path, env={f"MERGEBENCH_{name}": value}), *words)


def test_bar_only_on_a_terminal(scene: Scene) -> None:
    """A terminal sees progress on the way, a pipe only the result."""
    piped = assert_done(call(*TIES, cwd=scene.path))
    code, shown = on_a_terminal(*TIES, "--force", scene=scene)

    assert piped.err == ""
    assert "\x1b" not in piped.out
    assert code == 0
    assert "%" in shown
    assert "out: model" in shown


@pytest.mark.parametrize("switch", ["--quiet", "--json"])
def test_no_bar_where_nobody_looks(scene: Scene, switch: str) -> None:
    """--quiet and --json draw no bar on a terminal either."""
    code, shown = on_a_terminal(*TIES, switch, scene=scene)

    assert code == 0
    assert "%" not in shown
    assert "\x1b" not in shown


def test_no_color_is_respected(scene: Scene) -> None:
    """Errors are coloured on a terminal unless NO_COLOR is set, and never in a pipe."""
    wrong = ("merge", "ft1", "-m", "tiess")
    code, shown = on_a_terminal(*wrong, scene=scene)
    plain_code, plain = on_a_terminal(*wrong, scene=scene, env={"NO_COLOR": "1"})

    assert (code, plain_code) == (2, 2)
    assert COLOUR.search(shown)
    assert not COLOUR.search(plain)
    assert "no merge method 'tiess'" in plain
    assert "\x1b" not in call(*wrong, cwd=scene.path).err


def test_long_names_are_whole_in_a_pipe(scene: Scene) -> None:
    """Tables are not cut to a width that nobody sees."""
    ran = call("diff", "base", "ft1", cwd=scene.path, env={"COLUMNS": "40"})

    for name in scene.taus[0]:
        assert f"\n{name} " in ran.out


def test_closed_pipe_is_no_error(scene: Scene) -> None:
    """A reader that stops early, as head does, gets no traceback and no code for findings."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [COMMAND, "methods", "ties"],
        cwd=scene.path,
        env=clean_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--json"), ("--help",)])
def test_output_on_a_full_disk(scene: Scene, arguments: tuple[str, ...]) -> None:
    """One line and exit code 2, also for what is written as the process ends."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=scene.path,
            env=clean_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be printed: No space left on device\n"


def test_interrupt_while_loading(scene: Scene) -> None:
    """An interrupt while libraries are still imported gives the same line as a later one."""
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from mergebench.cli.start import main
main()
"""
    ran = run_python(code, cwd=scene.path)
    assert ran == Ran(130, "", "error: interrupted; nothing was written\n")


def test_interrupt_while_numpy_is_loading(scene: Scene) -> None:
    """Or the C code of numpy would take it for a broken installation."""
    code = """
import os, signal, sys
# A shell that starts tests in the background leaves their children deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.lib":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from mergebench.cli.start import main
main()
"""
    models = ("merge", "ft1", "ft2", "-b", "base")
    ran = run_python(code, *models, "-m", "ties", "-o", "out.safetensors", cwd=scene.path)
    assert ran == Ran(130, "", "error: interrupted; nothing was written\n")


def test_threads_that_wait_for_work_sleep(scene: Scene) -> None:
    """Those of OpenBLAS begin when numpy is imported; what the user has asked for stays."""
    name = "OPENBLAS_THREAD_TIMEOUT"
    code = f"""
import os, sys
os.environ.pop({name!r})
if len(sys.argv) > 1:
    os.environ[{name!r}] = sys.argv.pop()
sys.argv.append("--version")
from mergebench.cli.start import main
try:
    main()
finally:
    print(os.environ[{name!r}])
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "9")
        assert run_python(code, cwd=scene.path).out.split()[-1] == "12"
        assert run_python(code, "20", cwd=scene.path).out.split()[-1] == "20"


def test_python_runs_the_package(scene: Scene) -> None:
    """``python -m mergebench`` is the command."""
    code = "import runpy; runpy.run_module('mergebench', run_name='__main__')"
    ran = run_python(code, "--version", cwd=scene.path)
    assert ran == command("--version", cwd=scene.path)


IMPORTED = """
import sys
from mergebench.cli.main import main
sys.argv = ["mergebench", *sys.argv[2:]], sys.argv[1].split(",")
sys.argv, unwanted = sys.argv
try:
    main()
except SystemExit as end:
    code = end.code or 0
found = [name for name in unwanted if name in sys.modules]
print("imported:", *found)
sys.exit(code)
"""
COMMANDS = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), *((c, "-h") for c in COMMANDS)])
def test_help_imports_nothing_heavy(scene: Scene, arguments: tuple[str, ...]) -> None:
    """Help and version start neither numpy nor torch, nor what they bring."""
    heavy = "numpy,torch,scipy,numba,safetensors,transformers,huggingface_hub"

    ran = assert_done(run_python(IMPORTED, heavy, *arguments, cwd=scene.path))

    assert ran.out.splitlines()[-1] == "imported:"


@pytest.mark.parametrize(
    "arguments",
    [
        TIES,
        ("merge", "ft1", "ft2", "-o", "out", "--dtype", "bf16"),
        ("merge", "a.safetensors", "b.safetensors", "--method", "breadcrumbs"),
        ("merge", "lora1", "lora2", "-b", "base", "-m", "task_arithmetic", "-o", "out"),
        ("inspect", "base+lora1", "--tensors"),
        ("spectral", "ft1", "lora1", "-b", "base"),
    ],
)
def test_merging_on_the_cpu_needs_no_torch(scene: Scene, arguments: tuple[str, ...]) -> None:
    """A merge from the command line starts no torch and no transformers."""
    ran = assert_done(run_python(IMPORTED, "torch,transformers,peft", *arguments, cwd=scene.path))

    assert ran.out.splitlines()[-1] == "imported:"
    shown = run_python(IMPORTED, "numpy", *arguments, "-h", cwd=scene.path)
    assert shown.out.splitlines()[-1] == "imported:"


def test_importing_the_package_costs_nothing(scene: Scene) -> None:
    """``import mergebench`` loads no other library."""
    code = "import sys, mergebench; print({'numpy', 'torch', 'typer'} & set(sys.modules))"

    assert assert_done(run_python(code, cwd=scene.path)).out == "set()\n"
