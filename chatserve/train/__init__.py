"""The recipe of StackLLaMA: supervised fine-tuning, a reward model, reinforcement learning."""
