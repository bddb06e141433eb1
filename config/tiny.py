# The first run: about a minute on a laptop's CPU, on the source of the Python standard library.
# Shape, batch size and learning rates were tuned for the lowest validation loss after one minute on 2 cores.
out_dir = "out/tiny"
dataset = "stdlib"
tokenizer = "bytes"

n_layer = 2
n_head = 2
n_embd = 128
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
