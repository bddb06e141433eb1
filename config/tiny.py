# The first run: about a minute on a laptop's CPU, on the source of the Python standard library.
# Vocabulary, shape, batch size and learning rates were chosen by bits per byte for one minute on 2 cores: see
# docs/figures.md. These are the defaults of train.py, spelled out to be copied and changed. For single bytes
# instead of its BPE: --tokenizer=bytes
out_dir = "out/tiny"
dataset = "stdlib"
tokenizer = "stdlib"

n_layer = 2
n_head = 2
n_embd = 96
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
