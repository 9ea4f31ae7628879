"""What `chatserve doctor` looks at: the software, the machine, the settings, a model's speed."""
