"""What scripts/bench-peers records, and how a record is shown: two tables and an SVG figure."""
import collections
import json
import math

FORMAT = "sagelm-bench-peers-1"


class Failure(Exception):
    """What ends the program with one sentence and status 1."""


# layout: how the memory lies, bnhd = [batch, tokens, heads, dim] or bhnd. inputs: standard normal,
# or with offsets in some channels of Q and K, as models have.
Case = collections.namedtuple("Case", "batch heads kv_heads dim tokens causal dtype layout inputs",
                              defaults=("fp16", "bnhd", "normal"))


def row_case(row):
    return Case(*(row[field] for field in Case._fields))


def describe(case):
    return (f"b{case.batch} h{case.heads}/{case.kv_heads} d{case.dim} n{case.tokens} "
            f"{'causal' if case.causal else 'full'} {case.dtype} {case.layout}"
            + (f" {case.inputs}" if case.inputs != "normal" else ""))


def operations(case):
    return 4 * case.batch * case.heads * case.tokens**2 * case.dim * (0.5 if case.causal else 1)


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write(path, text):
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}") from error


def read_record(path):
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if record["format"] != FORMAT:
            raise Failure(f"{path} is a record of another format, {record['format']}")
        for row in record["results"]:
            operations(row_case(row)), math.log2(row["tokens"])
            for figures in row["kernels"].values():
                math.log2(figures["tflops"])
                if figures["rel_l1"] is not None:
                    figures["rel_l1"] + figures["cosine"]
        record["gpu"], record["date"], record["versions"].items(), "\n".join(record["notes"])
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{path} is not a record that bench-peers wrote ({error!r})") from error
    return record


def kernel_names(rows):
    return list(dict.fromkeys(name for row in rows for name in row["kernels"]))


def print_table(record):
    rows, names = record["results"], kernel_names(record["results"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    print(f"{record['gpu']}, {record['date']}; {versions}")

    def line(first, cells):
        print(f"{first:<42}" + "".join(f"{cell:>18}" for cell in cells))

    def table(title, show):
        print()
        line(title, names)
        for row in rows:
            found = [row["kernels"].get(name) for name in names]
            line(describe(row_case(row)), [show(f) if f else "-" for f in found])

    table("TFLOPS, whole call", lambda figures: f"{figures['tflops']:#.4g}".rstrip("."))
    table("relative L1 error, cosine", lambda figures: "not finite"
          if figures["rel_l1"] is None else f"{figures['rel_l1']:.5f} {figures['cosine']:.6f}")
    if record["notes"]:
        print("\n" + "\n".join(f"note: {note}" for note in record["notes"]))


# Line colours on light and on dark; ours are solid, the peers' dashed.
LOOKS = {"sagelm-sage2": ("#c2410c", "#fb923c", ""), "sagelm-sage1": ("#0b62a8", "#60a5fa", ""),
         "sagelm-fp16": ("#5b6068", "#a8b0bb", ""), "torch-flash": ("#0f7b4f", "#4ade80", "7 4"),
         "torch-cudnn": ("#6d28d9", "#c4b5fd", "7 4"),
         "sageattention": ("#a2185b", "#f472b6", "7 4")}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 830, 440, 62, 200, 74, 52


def escape(text):
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def figure(record):
    """SVG: TFLOPS over the length, head size 128, causal, as many KV heads as heads."""
    wanted = [row for row in record["results"] if row["causal"] and row["dim"] == 128 and
              row["heads"] == row["kv_heads"] and row["inputs"] == "normal" and row["kernels"]]
    same = [f for f in Case._fields if f != "tokens"]
    wanted = [row for row in wanted if all(row[f] == wanted[0][f] for f in same)]
    if not wanted:
        raise Failure("there is no causal result at head size 128, which the figure shows")
    wanted.sort(key=lambda row: row["tokens"])
    first, last = (math.log2(wanted[i]["tokens"]) for i in (0, -1))
    highest = max(f["tflops"] for row in wanted for f in row["kernels"].values())
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if highest / s <= 7)
    top = step * math.ceil(highest / step)

    def x(tokens):
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(tokens) - first) / max(last - first, 1)

    def y(tflops):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * tflops / top

    names = kernel_names(wanted)
    looks = {name: LOOKS.get(name, ("#1a1c1f", "#e6e9ee", "2 3")) for name in names}

    def style(shade, back, text, grid):
        lines = "".join(f".k{i}{{stroke:{looks[name][shade]};fill:{looks[name][shade]}}}"
                        for i, name in enumerate(names))
        return f".back{{fill:{back}}}text{{fill:{text}}}.grid{{stroke:{grid}}}{lines}"

    shown = row_case(wanted[0])
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="TFLOPS of attention kernels over the sequence length">',
        "<style>text{font:14px sans-serif}.title{font-size:17px;font-weight:bold}"
        f"{style(0, '#fff', '#1a1c1f', '#d5d8dd')}@media(prefers-color-scheme:dark){{"
        f"{style(1, '#0d1117', '#e6e9ee', '#363c45')}}}"
        ".line{fill:none;stroke-width:2}.bold{stroke-width:3.5}.dot,.key{stroke:none}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="16" y="26">Attention on {escape(record["gpu"])}: TFLOPS over the '
        "sequence length</text>",
        f'<text x="16" y="48">head size {shown.dim}, causal, batch {shown.batch}, {shown.heads} '
        f"heads, {shown.dtype.upper()} in and out, quantization included; {escape(record['date'])}"
        "</text>"]
    for i in range(int(top / step) + 1):
        at = y(i * step)
        svg.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
                   f'<text x="{LEFT - 8}" y="{at + 5:.1f}" text-anchor="end">{i * step}</text>')
    for row in wanted:
        tokens = row["tokens"]
        label = f"{tokens // 1024}k" if tokens % 1024 == 0 else tokens
        svg.append(f'<text x="{x(tokens):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
                   f"{label}</text>")
    svg.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
               "tokens</text>")
    keys = []
    for i, name in enumerate(names):
        points = [(x(row["tokens"]), y(row["kernels"][name]["tflops"]))
                  for row in wanted if name in row["kernels"]]
        bold = " bold" if name == "sagelm-sage2" else ""
        dash = f' stroke-dasharray="{looks[name][2]}"' if looks[name][2] else ""
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        svg.append(f'<g class="k{i}"><path class="line{bold}"{dash} d="M{path}"/>' + "".join(
            f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>' for px, py in points)
            + "</g>")
        final = [row["kernels"][name]["tflops"] for row in wanted if name in row["kernels"]][-1]
        keys.append([points[-1][1], i, f"{name} {final:.0f}"])
    # Names at the ends of the lines: pushed apart, then back up where that leaves the figure.
    keys.sort()
    for above, key in zip(keys, keys[1:]):
        key[0] = max(key[0], above[0] + 18)
    lowest = HEIGHT - BOTTOM
    for key in reversed(keys):
        key[0] = min(key[0], lowest)
        lowest = key[0] - 18
    svg += [f'<text class="key k{i}" x="{WIDTH - RIGHT + 12}" y="{at + 5:.1f}">'
            f"{escape(text)}</text>" for at, i, text in keys]
    return "\n".join(svg + ["</svg>"]) + "\n"


