"""Times the grouped GEMMs of one rank's experts on a GPU, by the tokens of each instance. CSV on stdout.

    python3 hardware/measured/grouped_gemm.py > FILE.csv

gemms_us: the two grouped products of a forward; layer_us: with SwiGLU between them; backward_us: the four products of a
backward. bf16, median of 20, caches emptied before each. Needs PyTorch 2.8 or later.
"""
import statistics
import sys

import torch
import torch.nn.functional as F

SHAPES = [(4096, 1536, 2, 4), (4096, 1408, 2, 4), (7168, 2048, 4, 6)]  # hidden, width, instances without and with replicas
TOKENS = [16, 64, 128, 192, 256, 320, 384, 512, 640, 1024, 2048, 4096, 8192]
BACKWARD = [256, 1024, 4096, 8192]
UNEVEN_TOTAL = 16384

grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.1


def time_us(run):
    for _ in range(4):
        run()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure(hidden, width, tokens, backward):
    offsets = torch.tensor(tokens, device="cuda").cumsum(0).to(torch.int32)
    rows = sum(tokens)
    x, a = random(rows, hidden), random(rows, width)
    w1, w2 = random(len(tokens), hidden, 2 * width), random(len(tokens), width, hidden)
    dy1, dy2 = random(rows, 2 * width), random(rows, hidden)

    def gemms():
        grouped(x, w1, offs=offsets)
        grouped(a, w2, offs=offsets)

    def layer():
        gate, up = grouped(x, w1, offs=offsets).chunk(2, dim=-1)
        grouped(F.silu(gate) * up, w2, offs=offsets)

    def back():
        grouped(dy2, w2.transpose(1, 2), offs=offsets)
        grouped(dy1, w1.transpose(1, 2), offs=offsets)
        grouped(a.t(), dy2, offs=offsets)
        grouped(x.t(), dy1, offs=offsets)

    last = f"{time_us(back):.1f}" if backward else ""
    print(f"{hidden},{width},{' '.join(map(str, tokens))},{time_us(gemms):.1f},{time_us(layer):.1f},{last}", flush=True)


print(torch.cuda.get_device_name(), torch.__version__, file=sys.stderr)
print("hidden,width,tokens,gemms_us,layer_us,backward_us")
for hidden, width, *instances in SHAPES:
    for count in instances:
        for tokens in TOKENS:
            measure(hidden, width, [tokens] * count, tokens in BACKWARD)
    for count in (2, 4, 8):
        for share in (0.0, 0.5, 0.8, 0.95):
            rest = (UNEVEN_TOTAL - int(UNEVEN_TOTAL * (1 / count + share * (1 - 1 / count)))) // (count - 1)
            measure(hidden, width, [UNEVEN_TOTAL - rest * (count - 1)] + [rest] * (count - 1), False)
