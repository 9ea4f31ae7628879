"""The recipe of StackLLaMA: answers with votes, fine-tuning, a reward model, reinforcement."""
