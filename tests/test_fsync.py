"""A checkpoint is on the disk before it takes the place of the last one."""

import os

import torch
from conftest import make_model

from gpt import GPT


def test_a_checkpoint_is_flushed_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Otherwise a power failure right after the rename leaves an empty file, and the last checkpoint is gone."""
    path, done = tmp_path / "m.pt", []

    def fsync(fd: int, call=os.fsync) -> None:
        call(fd)
        done.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))

    def replace(source: str, target: str, call=os.replace) -> None:
        done.append("replace")
        call(source, target)

    make_model(seed=1).save(path)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    model = make_model(seed=2)
    model.save(path)
    assert done == [(path.stat().st_ino, path.stat().st_size), "replace"]
    assert torch.equal(GPT.load(path).lm_head.weight, model.lm_head.weight)
