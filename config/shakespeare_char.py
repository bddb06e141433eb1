# nanoGPT's baby GPT (6 layers, 6 heads, 384 channels, context 256) on tiny Shakespeare by the byte, for one GPU.
# To make it small, for a CPU: --n_layer=4 --n_head=4 --n_embd=128 --sequence_len=64 --batch_size=12 --dropout=0
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
eval_interval = 250
eval_iters = 200
log_interval = 10
compile = True
