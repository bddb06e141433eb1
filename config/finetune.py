# Fine-tune a pretrained model on your own text. Shape and tokenizer are the checkpoint's:
#   M=hf:HuggingFaceTB/SmolLM2-135M
#   python data/text/prepare.py --input my_texts/ --tokenizer $M --out_dir data/mine
#   python train.py config/finetune.py --init_from=$M --dataset=mine
# Learning rates are at most a twentieth of those from scratch, after a warmup, to keep what the model has
# learned.
out_dir = "out/finetune"
dataset = "text"

sequence_len = 512
batch_size = 4
gradient_accumulation_steps = 4
max_iters = 200
warmup_iters = 20
warmdown = 0.8

learning_rate = 0.001
embd_lr = 1e-4
head_lr = 1e-4
momentum = 0.95
beta1 = 0.9
grad_clip = 1.0

eval_interval = 50
eval_iters = 16
log_interval = 5
sample_prompt = "\n"
sample_tokens = 300
