# config/tiny.py with Llama's architecture, which other programs know: the model exports to transformers and
# vLLM (python -m sologpt.hf export), and to llama.cpp and Ollama (python -m sologpt.gguf export).
out_dir = "out/llama_tiny"
dataset = "stdlib"
tokenizer = "stdlib"

mlp = "swiglu"
qk_norm = False
embd_norm = False
norm_weight = True
softcap = 0.0

n_layer = 2
n_head = 2
n_embd = 96
n_hidden = 256
sequence_len = 128

batch_size = 16
max_iters = 600
momentum = 0.9
head_lr = 0.01
warmdown = 0.5
eval_interval = 200
eval_iters = 64
log_interval = 10

sample_prompt = "def __init__(self"
sample_tokens = 180
