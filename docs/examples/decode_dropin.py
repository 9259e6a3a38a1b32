"""Attention of the next token of every response, over prompts that are held once.

python docs/examples/decode_dropin.py
"""

import torch
import torch.nn.functional as F

import r1kernels

PROMPTS, SAMPLES, PROMPT, ROOM = 3, 4, 20, 16
HEADS, KEY_HEADS, SIZE = 4, 2, 32
ROWS = PROMPTS * SAMPLES


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    prompts = tuple(torch.randn(PROMPTS, KEY_HEADS, PROMPT, SIZE) for _ in range(2))  # keys, values
    cache = tuple(torch.zeros(ROWS, KEY_HEADS, ROOM, SIZE) for _ in range(2))
    nodes = [row // SAMPLES for row in range(ROWS)]  # the prompt of each row
    shared = r1kernels.SharedPrefix.of(nodes, [PROMPT] * ROWS)
    texts = [kept[nodes] for kept in prompts]  # what people hold: a copy of the prompt in every row
    largest = 0.0
    for drawn in range(ROOM):
        query = torch.randn(ROWS, HEADS, SIZE)
        key, value = (torch.randn(ROWS, KEY_HEADS, SIZE) for _ in range(2))
        layout = r1kernels.DecodeLayout(torch.full((ROWS,), drawn), drawn, [shared])  # one for all layers
        ours = r1kernels.decode_attention(query, key, value, cache, layout, [prompts])

        texts = [
            torch.cat((text, new.unsqueeze(2)), 2) for text, new in zip(texts, (key, value), strict=True)
        ]
        eager = F.scaled_dot_product_attention(query.unsqueeze(2), *texts, enable_gqa=True).squeeze(2)
        largest = max(largest, (ours - eager).abs().max().item())
    held = sum(each.numel() for each in (*prompts, *cache)), sum(text.numel() for text in texts)
    print(f"numbers held: {held[0]:,} against {held[1]:,}")
    print(f"largest difference {largest:.1e}")


if __name__ == "__main__":
    main()
