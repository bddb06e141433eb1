# Teach the model of config/tiny.py to answer: questions about the Python standard library, answered by its
# docstrings, offline. Half a minute on a laptop's CPU.
#   python train.py config/tiny.py && python train.py config/chat_tiny.py
#   python sample.py --chat --prompt "What does os.path.join do?" --temperature 0
out_dir = "out/chat_tiny"
init_from = "out/tiny/best.pt"
dataset = "docstrings"

batch_size = 16
max_iters = 450
learning_rate = 0.005
embd_lr = 0.03
head_lr = 0.002
warmdown = 0.8

eval_interval = 450
eval_iters = 32
log_interval = 10
sample_tokens = 100
