import json

import pytest
from conftest import run

import bench
from gpt import GPTConfig


def test_it_measures_what_it_says(monkeypatch, capsys):
    monkeypatch.setitem(
        bench.SHAPES, "tiny", GPTConfig(sequence_len=1024, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
    )
    argv = ["bench.py", "--shape=tiny", "--rounds=2", "--tokens=3", "--peers=transformers", "--device=cpu"]
    monkeypatch.setattr("sys.argv", [*argv, "--json"])
    bench.main()
    results = json.loads(capsys.readouterr().out)
    assert set(results["position"]) == {"100", "500", "1000"} and set(results["batch"]) == {"1", "4", "16"}
    for size in results["batch"].values():
        assert set(size) == {"soloGPT", "transformers"}
        assert all(len(rival["rounds"]) == 2 and rival["median"] > 0 for rival in size.values())
    monkeypatch.setattr("sys.argv", argv)
    bench.main()
    assert capsys.readouterr().out.count("ratio") == 6


@pytest.mark.parametrize("flag", ["--shape=huge", "--dtype=int8", "--peers=nobody", "--rounds=0"])
def test_bad_flags_are_one_line(flag):
    assert run("bench.py", flag, status=2).stderr.startswith("error: ")
