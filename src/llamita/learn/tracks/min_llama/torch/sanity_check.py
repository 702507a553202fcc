"""Compares your whole Llama with logits and hidden states that Llamita's own model gave for the same weights."""

import numpy as np
import torch
from llama import load_pretrained

if __name__ == "__main__":
    expected = np.load("sanity_check.npz")
    llama = load_pretrained("stories.pt").eval()
    with torch.no_grad():
        logits, hidden_states = llama(torch.from_numpy(expected["tokens"]))
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(hidden_states, torch.from_numpy(expected["hidden_states"]), atol=1e-4, rtol=1e-3)
    print("Your Llama implementation is correct!")
