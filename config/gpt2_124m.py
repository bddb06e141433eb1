# The shape of GPT-2 (124M), for a GPU with 80 GB: half a million tokens per step, 10 billion in all.
# Prepare the text first:
#   python data/text/prepare.py --input DIR --tokenizer gpt2
out_dir = "out/gpt2_124m"
dataset = "text"
tokenizer = "gpt2"

n_layer = 12
n_head = 12
n_embd = 768
sequence_len = 1024
vocab_size = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed

batch_size = 32
gradient_accumulation_steps = 16
max_iters = 10 * 10**9 // (batch_size * gradient_accumulation_steps * sequence_len)
momentum = 0.95
head_lr = 0.004
warmdown = 0.4
compile = True

eval_interval = 250
eval_iters = 20
log_interval = 10
sample_prompt = "\n"
sample_tokens = 300
