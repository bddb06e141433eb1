# nanoGPT's baby GPT: tiny Shakespeare, one token per byte, on one GPU. For a CPU, add
#   --n_layer=4 --n_head=4 --n_embd=128 --sequence_len=64 --batch_size=12 --dropout=0
out_dir = "out/shakespeare_char"
dataset = "shakespeare"
tokenizer = "bytes"

n_layer = 6
n_head = 6
n_embd = 384
sequence_len = 256
dropout = 0.2

batch_size = 64
max_iters = 2000
momentum = 0.95
head_lr = 0.004
warmdown = 0.4
compile = True

eval_interval = 250
eval_iters = 200
log_interval = 10
sample_prompt = "\n"
sample_tokens = 300
