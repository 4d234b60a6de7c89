"""What autograd and torch.compile see: custom ops with fake implementations and their backward passes."""
