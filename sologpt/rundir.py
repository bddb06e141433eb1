"""A run's folder: one run writes to it at a time, an earlier run is moved aside, and old states are deleted."""

import itertools
import math
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gpt import GPT
from sologpt.load import find_checkpoint

WRITTEN = ("ckpt.pt", "best.pt", "metrics.jsonl", "loss.png", "tensorboard")  # by a run, besides ckpt_STEP.pt
STATE = {"step": int, "best": float, "id": str, "optimizers": list, "train_config": dict}  # what ckpt.pt holds


def reserve(out_dir: Path, resumes: bool) -> IO[str]:
    """Make out_dir and lock it, until the file that this returns is closed or the process ends, however it ends.

    OSError if it cannot be written, or there is no state to resume from. ValueError if another run has it.
    """
    if resumes and not (out_dir / "ckpt.pt").exists():
        raise FileNotFoundError(f"there is no checkpoint {out_dir / 'ckpt.pt'} to resume from")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        file = open(out_dir / "lock", "a")  # noqa: SIM115  (open as long as the run)
    except OSError as e:
        raise OSError(f"--out_dir={out_dir} cannot be written: {e.strerror}") from e
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        file.close()
        raise ValueError(f"another run writes to {out_dir}: stop it first, or choose another --out_dir") from e
    except OSError:
        pass  # some network file systems have no locks
    return file


def set_aside_old_run(out_dir: Path) -> None:
    """Move all that an earlier run has written, which was perhaps to be resumed, to out_dir/old-N."""
    found = [path for path in (*map(out_dir.joinpath, WRITTEN), *states(out_dir).values()) if path.exists()]
    if found:
        old = next(old for n in itertools.count(1) if not (old := out_dir / f"old-{n}").exists())
        old.mkdir()
        for path in found:
            path.rename(old / path.name)
        print(f"moved the earlier run in {out_dir} to {old} (--init_from=resume would have continued it)")


def states(out_dir: Path) -> dict[int, Path]:
    """The files ckpt_STEP.pt, by step."""
    named = ((re.fullmatch(r"ckpt_(\d{8,})\.pt", path.name), path) for path in out_dir.iterdir())
    return {int(match[1]): path for match, path in named if match}


def delete_old_states(out_dir: Path, step: int, keep: int) -> None:
    """Of the files ckpt_STEP.pt up to `step`, keep the last `keep`."""
    older = [path for n, path in sorted(states(out_dir).items()) if n <= step]
    for path in older[:-keep]:
        path.unlink()


def holds_state(out_dir: Path, settings: dict[str, Any]) -> bool:
    """Whether out_dir/ckpt.pt is the state of a run with these settings. RuntimeError if it is damaged."""
    path = out_dir / "ckpt.pt"
    if not path.exists():
        return False
    state = GPT.load_checkpoint(path)[1]
    check_state(path, state)
    return all(state["train_config"].get(key) == value for key, value in settings.items())


def check_state(path: Path, state: dict[str, Any]) -> None:
    """RuntimeError if a checkpoint holds no state to resume from, or values that no run writes."""
    if not STATE.keys() <= state.keys():
        raise RuntimeError(f"{path} holds no state to resume from; to fine-tune its weights: --init_from={path}")
    ok = all(type(state[key]) is kind for key, kind in STATE.items()) and all(
        type(state["train_config"].get(key)) is kind for key, kind in (("sequence_len", int), ("init_from", str))
    )
    if not ok or state["step"] < 0 or math.isnan(state["best"]) or state["train_config"]["sequence_len"] < 1:
        raise RuntimeError(f"{path} is damaged: it is no state of a run")


def sample_command(best: Path, prompt: str) -> str:
    """What to type to sample from best: without --ckpt where sample.py would take it by itself."""
    command = ["python", str(Path(sys.argv[0]).with_name("sample.py"))]
    found = None
    with suppress(OSError):
        found = find_checkpoint("out").resolve()
    if found != best.resolve():
        command += ["--ckpt", str(best)]
    if prompt.strip() and prompt.isprintable():  # else it is sample.py's own, or hard to type
        command += ["--prompt", prompt]
    return shlex.join(command)
