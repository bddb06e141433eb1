import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; torch reads it when it is imported

import torch

from gpt import GPT, GPTConfig
from sologpt import errors

ROOT = Path(__file__).resolve().parent.parent


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes share the tests. All tests: one more than cores, which idle while scripts start, at most 4.

    Some that are named: none but this one.
    """
    cores = os.cpu_count() or 1
    return min(cores + 1, 4) if config.args_source != config.ArgsSource.ARGS else 0


def pytest_report_header(config: pytest.Config) -> str:
    return "the quick tests, about 6 minutes on 2 cores; all of them: pytest -m ''"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks train models, for 20 to 40 s each. test_inside_notebook.py has a quick run of one's cells."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)


settings.register_profile("shared cores", deadline=None)  # other tests may take them for a while
settings.load_profile("shared cores")

# Tests and the processes that they start run on the CPU. test_cuda.py gives its processes these GPUs.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
if torch.cuda.is_available():
    torch.cuda.init()  # this process sees them from now on, whatever its environment says
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def auto_is_cpu(monkeypatch):
    """The device "auto" of what runs in this process."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0, **config) -> GPT:
    """A small model whose weights are all random: in a fresh one, many are zero, and hide mistakes."""
    torch.manual_seed(seed)
    defaults = dict(sequence_len=32, vocab_size=61, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
    model = GPT(GPTConfig(**defaults | config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype)


# Where ours is another architecture, as far from the default as can be
LLAMA = dict(
    mlp="swiglu", n_hidden=40, head_dim=10, qk_norm=False, embd_norm=False, norm_weight=True, softcap=0.0
)
QWEN = LLAMA | dict(
    qk_norm=True, qkv_bias=True, tie_embd=True, rope_scaling={"rope_type": "linear", "factor": 3.0}
)
GPT2 = dict(norm="layer", norm_weight=True, bias=True, positions="learned", mlp="gelu_tanh", qk_norm=False)
GPT2 |= dict(embd_norm=False, softcap=0.0, tie_embd=True, head_dim=9)
GEMMA = LLAMA | dict(mlp="geglu", qk_norm=True, tie_embd=True, embd_scale=True, post_norm=True, rope_base=1e6)
GEMMA |= dict(layer_types="SSF", sliding_window=5, window_rope_base=1e4)
GEMMA |= dict(rope_scaling={"rope_type": "linear", "factor": 8.0})
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "attention_factor": 1.2,
}
WINDOWS = dict(layer_types="SFN", sliding_window=5)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


# Each script runs in a process of its own, forked from one that has imported PyTorch and the modules: that takes longest.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "tiktoken", "matplotlib.pyplot", "common", "sample", "train"]
)


def script(args: list[str], streams: list[str], cwd: Path, env: dict[str, str], plot: bool) -> None:
    """In such a process: what `python *args` does, with its standard streams in files."""
    for fd, (path, mode) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(path, mode), fd)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if "OMP_NUM_THREADS" in env:  # was read before the fork
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if not plot:
        sys.modules["matplotlib"] = None  # as if it were not installed
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        exec(args[1], {"__name__": "__main__"})
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")


class Script:
    """A script of the repository that runs: `process` is a multiprocessing.Process.

    plot: whether train.py draws loss.png, which takes as long as all the rest of a short run.
    """

    def __init__(
        self, *args: str | Path, cwd: Path = ROOT, stdin: str = "", plot: bool = False, **env: str
    ) -> None:
        self.args = [str(arg) for arg in args]
        self.folder = tempfile.TemporaryDirectory()
        streams = [f"{self.folder.name}/{name}" for name in ("stdin", "stdout", "stderr")]
        for path, text in zip(streams, (stdin, "", ""), strict=True):
            Path(path).write_text(text)
        env = dict(os.environ) | env
        self.process = FORKS.Process(target=script, args=(self.args, streams, cwd, env, plot))
        self.process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"{self.args} does not end"
        out, err = (Path(self.folder.name, name).read_text() for name in ("stdout", "stderr"))
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.args, self.process.exitcode, out, err)


def run(
    *args: str | Path, cwd: Path = ROOT, status: int = 0, stdin: str = "", plot: bool = False, **env: str
) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, and check its exit status."""
    if cwd == ROOT or Path(args[0]).parent == ROOT:
        done = Script(*args, cwd=cwd, stdin=stdin, plot=plot, **env).wait()
    else:
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error(*args: str | Path, status: int = 2, **kwargs) -> str:
    """The one line on stderr of a run that fails."""
    done = run(*args, status=status, **kwargs)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture
def error_here(monkeypatch, capsys):
    """What `error` returns, of a script that runs in this process, to be fast."""

    def error_here(script: ModuleType, *args: str | Path, status: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            errors.run(script.main)
        lines = capsys.readouterr().err.splitlines()
        assert e.value.code == status and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return error_here


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A small dataset of bytes, prepared from text that repeats itself."""
    folder = tmp_path_factory.mktemp("dataset")
    text = folder / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i:02}.txt").write_text(
            "".join(f"def f{j}(x):\n    return x + {i * j}\n\n" for j in range(40))
        )
    run("data/text/prepare.py", "--input", text, "--out_dir", folder)
    return folder


def write_prepare(folder: Path, texts: Path) -> Path:
    """A dataset of the files in texts that is still to be prepared."""
    folder.mkdir()
    (folder / "prepare.py").write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT / 'data')!r})\nimport common\n"
        f"documents = [common.Document(path) for path in sorted(Path({str(texts)!r}).iterdir())]\n"
        f"common.main(Path({str(folder)!r}), lambda _: documents, 0.2, 'others')\n"
    )
    return folder


SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--sequence_len=16", "--batch_size=4", "--eval_iters=2"]
SMALL += ["--sample_tokens=0"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, dataset) -> Path:
    """The out_dir of a short run."""
    out = tmp_path_factory.mktemp("out") / "run"
    flags = [*SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=20", "--eval_interval=10"]
    run("train.py", *flags, plot=True)
    return out
