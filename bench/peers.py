"""The candidates: soloGPT and its peers, each built in the same shape.

A peer is an installed package or a clone of its repository. If its architecture has room for our weights, it
gets them; otherwise it has random weights of its own.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt import GPT, GPTConfig, KVCache
from sologpt import fast, hf
from sologpt.device import HUGE_PAGES
from sologpt.errors import RunError, UserError
from sologpt.load import empty_model, load_model

SHAPES = {
    "tiny": GPTConfig(sequence_len=1024, vocab_size=256, n_layer=6, n_head=6, n_embd=384),
    "gpt2": GPTConfig(sequence_len=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
}
NAMES = ("transformers", "nanogpt", "nanochat", "gpt-fast", "llama.cpp")
Ids = list[list[int]]  # token ids of each row


class Candidate:
    """An implementation with its model. Its methods return the call to time, or None if there is none."""

    name = ""
    reads_all_bytes = True  # each token reads all weights in the model's dtype: decode has its limit

    def decode(self, prompts: Ids, n: int) -> Callable[[], Ids] | None:
        """A call that prefills prompts of equal lengths, and returns n greedy tokens for each."""
        return None

    def prefill(self, prompt: list[int]) -> Callable[[], Any] | None:
        """A call that computes the logits after the prompt."""
        return None


# -----------------------------------------------------------------------------
# soloGPT


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> GPT:
    """Return a model of SHAPES with random weights, or the open model hf:NAME_OR_DIR, in eval mode."""
    if shape.startswith("hf:"):
        return load_model(shape, device, dtype)[0]
    torch.manual_seed(0)
    model = GPT(SHAPES[shape])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model = model.to(device, dtype).eval()
    HUGE_PAGES.take(model)  # as load_model does
    return model


def for_inference(model: GPT) -> GPT:
    """Return a second model on the same memory, whose modules `fast` may replace."""
    copy = empty_model(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy.eval()


class SoloGPT(Candidate):
    """Our model with the decoder that sample.py gives it."""

    def __init__(self, model: GPT, compile: bool = False, quantize: str | None = None) -> None:
        self.name = " ".join(filter(None, ("soloGPT", quantize, "compiled" if compile else "")))
        self.model = model
        self.compile = compile
        self.quantize = quantize
        self.reads_all_bytes = not quantize

    def decode(self, prompts: Ids, n: int) -> Callable[[], Ids]:
        model = for_inference(self.model)
        decode = fast.prepare(model, compile=self.compile, rows=len(prompts), quantize=self.quantize)

        def call() -> Ids:
            steps = model.generate_batch(prompts, n, temperature=0, decode=decode)
            return [[int(token) for token in row if token is not None] for row in zip(*steps, strict=True)]

        return call

    def prefill(self, prompt: list[int]) -> Callable[[], Tensor] | None:
        if self.compile:
            return None
        model = for_inference(self.model)
        fast.prepare(model, quantize=self.quantize)
        config = model.config
        return lambda: model.prefill([prompt], KVCache(config, 1, len(prompt), model.device, model.dtype))


# -----------------------------------------------------------------------------
# transformers


def as_transformers(model: GPT) -> Any:
    """Return the model of transformers with our architecture and our weights."""
    import transformers

    config, weights = hf.export(model)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    theirs.load_state_dict(weights, strict=not model.config.tie_embd)
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
    return theirs.to(model.device, model.dtype).eval()


class Transformers(Candidate):
    name = "transformers"

    def __init__(self, model: GPT) -> None:
        self.model = as_transformers(model)

    def decode(self, prompts: Ids, n: int) -> Callable[[], Ids]:
        idx = torch.tensor(prompts, device=self.model.device)  # (B, T)
        settings = dict(attention_mask=torch.ones_like(idx), do_sample=False)
        settings |= dict(max_new_tokens=n, min_new_tokens=n)
        return lambda: self.model.generate(idx, **settings)[:, idx.size(1) :].tolist()

    def prefill(self, prompt: list[int]) -> Callable[[], Any]:
        idx = torch.tensor([prompt], device=self.model.device)
        return lambda: self.model(idx, use_cache=True, logits_to_keep=1)


# -----------------------------------------------------------------------------
# nanoGPT, nanochat and gpt-fast, each from a clone


def load_file(path: str, name: str) -> Any:
    """Import one file as a module. If its folder were in sys.path, its neighbours could hide our modules."""
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_nanogpt(path: str, config: GPTConfig, device: torch.device) -> Any:
    nanogpt = load_file(f"{path}/model.py", "nanogpt")
    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = nanogpt.GPTConfig(**shape, block_size=config.sequence_len, dropout=0.0, bias=False)
    return nanogpt.GPT(theirs).to(device)


class NanoGPT(Candidate):
    """Prefill only: it has no KV cache."""

    name = "nanoGPT"

    def __init__(self, path: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device = make_nanogpt(path, config, device).to(dtype).eval(), device

    def prefill(self, prompt: list[int]) -> Callable[[], Any]:
        idx = torch.tensor([prompt], device=self.device)
        return lambda: self.model(idx)


def make_nanochat(path: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Return nanochat's model with full attention in every layer. Its value embeddings are extra weights."""
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")  # it is read once, at the import
    sys.path.append(path)
    from nanochat.gpt import GPT as NanoChatGPT  # type: ignore[import-not-found]
    from nanochat.gpt import GPTConfig as NanoChatConfig

    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    model = NanoChatGPT(NanoChatConfig(**{name: getattr(config, name) for name in names}, window_pattern="L"))
    model.to(device).init_weights()
    return model


class NanoChat(Candidate):
    name = "nanochat"

    def __init__(self, path: str, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = make_nanochat(path, config, device, dtype).eval(), device, dtype

    def decode(self, prompts: Ids, n: int) -> Callable[[], Ids]:
        from nanochat.engine import KVCache as NanoChatCache  # type: ignore[import-not-found]

        B, T, c = len(prompts), len(prompts[0]), self.model.config
        shape = (B, c.n_kv_head, T + n, c.n_embd // c.n_head, c.n_layer)

        def call() -> Ids:
            cache, steps = NanoChatCache(*shape, self.device, self.dtype), []
            ids = torch.tensor(prompts, device=self.device)  # (B, T), then (B, 1)
            for _ in range(n):
                ids = self.model(ids, kv_cache=cache)[:, -1].argmax(-1, keepdim=True)
                steps.append(ids.flatten().tolist())
            return [list(row) for row in zip(*steps, strict=True)]

        return call

    def prefill(self, prompt: list[int]) -> Callable[[], Any]:
        idx = torch.tensor([prompt], device=self.device)
        return lambda: self.model(idx)


class GptFast(Candidate):
    """gpt-fast's Llama. If our MLP has two matrices, its three have as many weights."""

    name = "gpt-fast"

    def __init__(
        self, path: str, config: GPTConfig, device: torch.device, dtype: torch.dtype, compile: bool
    ) -> None:
        gpt_fast = load_file(f"{path}/model.py", "gpt_fast")
        shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head")}
        shape |= dict(dim=config.n_embd, n_local_heads=config.n_kv_head, block_size=config.sequence_len)
        n_hidden = config.n_hidden if config.mlp == "swiglu" else None
        model = gpt_fast.Transformer(gpt_fast.ModelArgs(**shape, intermediate_size=n_hidden))
        self.model, self.device, self.compile = model.to(device, dtype).eval(), device, compile

    def decode(self, prompts: Ids, n: int) -> Callable[[], Ids]:
        B, T, device = len(prompts), len(prompts[0]), self.device
        with device:
            self.model.setup_caches(B, T + n)
        step = self.model
        if self.compile:
            step = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)

        def call() -> Ids:
            positions = torch.arange(T + n, device=device)
            logits = self.model(torch.tensor(prompts, device=device), positions[:T])  # (B, T, V)
            ids = logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            steps = [ids.flatten().tolist()]
            for i in range(T, T + n - 1):
                ids = step(ids.clone(), positions[i : i + 1])[:, -1].argmax(-1, keepdim=True)
                steps.append(ids.flatten().tolist())
            return [list(row) for row in zip(*steps, strict=True)]

        return call


# -----------------------------------------------------------------------------
# llama.cpp


class LlamaCpp(Candidate):
    """llama.cpp on a GGUF file, by low-level calls of llama-cpp-python, without its sampler and tokenizer."""

    reads_all_bytes = False  # it reads those of its file

    def __init__(self, name: str, path: str, max_rows: int, max_batch: int) -> None:
        import llama_cpp

        self.name = name
        self.api = llama_cpp
        # C calls it later: the attribute keeps it alive
        self.log_callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log_callback, None)
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise UserError(f"--peers=llama.cpp={path}: llama.cpp cannot load this file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 1024 * max_rows, max_rows
        params.n_batch = params.n_ubatch = max_batch  # tokens of all rows in one call
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forward(self, rows: Ids, position: int) -> list[int]:
        """Read rows (B, T) from `position` on. Return the most likely next token of each."""
        B, T = len(rows), len(rows[0])
        batch = self.api.llama_batch_init(B * T, 0, 1)
        batch.n_tokens = B * T
        for b, row in enumerate(rows):
            for t, token in enumerate(row):
                i = b * T + t
                batch.token[i] = token
                batch.pos[i] = position + t
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = b
                batch.logits[i] = t == T - 1  # of the last token alone
        if self.api.llama_decode(self.context, batch) != 0:
            raise RunError(f"llama.cpp cannot read {B} rows of {T} tokens at position {position}")
        self.api.llama_batch_free(batch)
        logits = [self.api.llama_get_logits_ith(self.context, b * T + T - 1) for b in range(B)]
        return [int(np.ctypeslib.as_array(each, (self.vocab_size,)).argmax()) for each in logits]

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, prompts: Ids, n: int) -> Callable[[], Ids]:
        def call() -> Ids:
            self.reset()
            steps = [self.forward(prompts, 0)]
            for i in range(n - 1):
                steps.append(self.forward([[token] for token in steps[-1]], len(prompts[0]) + i))
            return [list(row) for row in zip(*steps, strict=True)]

        return call

    def prefill(self, prompt: list[int]) -> Callable[[], Any]:
        def call() -> list[int]:
            self.reset()
            return self.forward([prompt], 0)

        return call
