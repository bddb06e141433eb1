# The shape of GPT-2 (124M: 12 layers, 12 heads, 768 channels, context 1024), for a GPU with 80 GB. Half a million
# tokens a step, 10 billion in all. First prepare the text: python data/text/prepare.py --input DIR --tokenizer gpt2
out_dir = "out/gpt2_124m"
dataset = "text"
tokenizer = "gpt2"

n_layer = 12
n_head = 12
n_embd = 768
sequence_len = 1024
vocab_size = 50304  # the tokenizer's 50257, rounded up to a multiple of 64 for speed

batch_size = 32
gradient_accumulation_steps = 16
max_iters = 10 * 10**9 // (batch_size * gradient_accumulation_steps * sequence_len)
eval_interval = 250
eval_iters = 20
log_interval = 10
compile = True
