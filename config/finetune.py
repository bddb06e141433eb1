# A pretrained model goes on with text of yours, whatever its size or family; its shape and tokenizer come with it:
#   python hf.py import HuggingFaceTB/SmolLM2-135M out/smollm2
#   python data/text/prepare.py --input my_texts/ --tokenizer out/smollm2/best.pt
#   python train.py config/finetune.py --init_from=out/smollm2/best.pt
# Rates are a twentieth and less of those from scratch, since the weights are nearly right; they rise while Adam and
# Muon gather what a gradient is like, then fall to zero.
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
beta1 = 0.9
grad_clip = 1.0

eval_interval = 50
eval_iters = 16
log_interval = 5
