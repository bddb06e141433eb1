# Teach an open model to answer, from conversations (data/chat/prepare.py). Shape and tokenizer are its own:
#   python data/chat/prepare.py --input conversations.jsonl --tokenizer hf:HuggingFaceTB/SmolLM2-135M
#   python train.py config/chat.py --init_from=hf:HuggingFaceTB/SmolLM2-135M
#   python sample.py --ckpt out/chat --chat --interactive
# Adapters instead of all weights: --lora_rank=16 --learning_rate=1e-3
out_dir = "out/chat"
dataset = "chat"

sequence_len = 1024
batch_size = 4
gradient_accumulation_steps = 4
max_iters = 200
warmup_iters = 10
warmdown = 1.0

optimizer = "adamw"
learning_rate = 5e-5
embd_lr = 5e-5
head_lr = 5e-5
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0

eval_interval = 50
eval_iters = 32
log_interval = 5
sample_prompt = ""
sample_tokens = 200
