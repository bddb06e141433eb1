# config/tiny.py with Llama's architecture, which other programs know: the model exports to transformers and vLLM
# (python -m sologpt.hf export), and to llama.cpp and Ollama (python -m sologpt.gguf export).
out_dir = "out/llama_tiny"
dataset = "stdlib"
tokenizer = "bytes"

mlp = "swiglu"
qk_norm = False
embd_norm = False
norm_weight = True
softcap = 0.0

n_layer = 2
n_head = 2
n_embd = 128
n_hidden = 352
sequence_len = 128

batch_size = 16
max_iters = 800
momentum = 0.9
head_lr = 0.01
warmdown = 0.5
eval_interval = 200
eval_iters = 64
log_interval = 10

sample_prompt = "def "
