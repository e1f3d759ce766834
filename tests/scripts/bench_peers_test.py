"""scripts/bench-peers without a GPU: its ctypes structs, and what it makes of a record.

  bench_peers_test.py ATTENTION_ABI     the program built from attention_abi.c
"""
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPT = os.path.join(ROOT, "scripts", "bench-peers")
ABI_PROGRAM = sys.argv.pop(1)

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(SCRIPT))
loader = importlib.machinery.SourceFileLoader("bench_peers", SCRIPT)
bench = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench_peers", loader))
loader.exec_module(bench)


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def make_record(change=lambda record: None):
    """A record such as a machine with four of the kernels writes. The figures mean nothing."""
    results = []
    for case in bench.default_cases(False, "fp16", "bnhd"):
        speed = 100 + case.tokens / 100
        kernels = {name: {"kernel": name, "rel_l1": 0.01 * i, "cosine": 1 - 0.0001 * i, "ms": 1.0,
                          "ms_min": 0.9, "ms_max": 1.1, "samples": 7, "calls_per_sample": 1,
                          "tflops": speed * i}
                   for i, name in enumerate(("torch-flash", "sagelm-sage2", "sagelm-fp16"), 1)}
        results.append({**case._asdict(), "kernels": kernels})
    results[0]["kernels"]["torch-cudnn"] = dict(kernels["torch-flash"], rel_l1=None, cosine=None)
    record = {"format": bench.FORMAT, "gpu": "Made-up <GPU>", "date": "2026-01-02",
              "versions": {"torch": "9.9"}, "notes": ["sageattention: not importable (x)"],
              "results": results}
    change(record)
    return record


class Layout(unittest.TestCase):
    def test_structs_match_the_header(self):
        printed = subprocess.run([ABI_PROGRAM], capture_output=True, text=True, check=True).stdout
        expected = {name: (int(offset), int(size))
                    for name, offset, size in map(str.split, printed.splitlines())}
        ours = {"ok": (0, 0)}
        for name, struct in (("tensor", bench.Tensor), ("args", bench.Args)):
            ours[name] = (0, ctypes.sizeof(struct))
            for field, _ in struct._fields_:
                ours[f"{name}.{field}"] = (getattr(struct, field).offset,
                                           getattr(struct, field).size)
        for name, code in bench.VARIANTS.items():
            ours[name] = (code, 0)
        ours["f16"] = (bench.DTYPE_CODES["fp16"], 0)
        ours["bf16"] = (bench.DTYPE_CODES["bf16"], 0)
        self.assertEqual(expected, ours)


class Cases(unittest.TestCase):
    def test_shapes(self):
        cases = bench.default_cases(False, "fp16", "bnhd")
        self.assertEqual(len(cases), len(set(cases)))
        self.assertIn(bench.Case(4, 32, 32, 64, 32768, False), cases)
        self.assertIn(bench.Case(4, 32, 8, 128, 8192, True), cases)
        self.assertIn(bench.Case(1, 32, 32, 128, 8192, True), cases)
        self.assertEqual({(c.dtype, c.layout) for c in cases},
                         {(d, l) for d in ("fp16", "bf16") for l in ("bnhd", "bhnd")})
        quick = bench.default_cases(True, "fp16", "bnhd")
        self.assertLess(len(quick), 7)
        self.assertLess(set(quick), set(cases))

    def test_operations(self):
        self.assertEqual(bench.operations(bench.Case(4, 32, 8, 128, 1024, False)),
                         4 * 4 * 32 * 128 * 1024**2)
        self.assertEqual(bench.operations(bench.Case(1, 2, 2, 64, 16, True)), 2 * 2 * 64 * 256)

    def test_shape_option(self):
        self.assertEqual(bench.parse_case("1,8,2,96,333,full", "bf16", "bhnd"),
                         bench.Case(1, 8, 2, 96, 333, False, "bf16", "bhnd"))
        for text in ("", "1,8,2,96,333", "1,8,2,96,333,half", "1,8,3,96,333,full",
                     "1,8,0,96,333,full", "1,8,2,x,333,full", "1,8,2,96,333,full,1"):
            self.assertEqual(run("--shape", text).returncode, 2, text)


class Records(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = os.path.join(folder.name, "record.json")
        self.figure = os.path.join(folder.name, "figure.svg")

    def show(self, record, *arguments):
        with open(self.file, "w", encoding="utf-8") as file:
            file.write(record if isinstance(record, str) else json.dumps(record))
        return run("--from", self.file, *arguments)

    def refuses(self, record, words, *arguments):
        result = self.show(record, *arguments)
        self.assertEqual(result.returncode, 1, result.stdout)
        self.assertRegex(result.stderr, rf"^bench-peers: .*{words}.*\n$")

    def test_table(self):
        result = self.show(make_record())
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        for text in ("Made-up <GPU>, 2026-01-02; torch 9.9", "b4 h32/8 d128 n8192 causal fp16 bnhd",
                     "220.5", "0.02000 0.999800", "not finite",
                     "note: sageattention: not importable (x)"):
            self.assertIn(text, result.stdout)

    def test_figure(self):
        self.assertEqual(self.show(make_record(), "--figure", self.figure).returncode, 0)
        root = xml.etree.ElementTree.parse(self.figure).getroot()
        texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
        for text in ("1k", "32k", "sagelm-fp16 1283", "sagelm-sage2 855", "torch-flash 428",
                     "Attention on Made-up <GPU>: TFLOPS over the sequence length"):
            self.assertIn(text, texts)
        lines = [e for e in root.iter("{http://www.w3.org/2000/svg}path")
                 if e.get("class").startswith("line")]
        self.assertEqual(sorted(e.get("d").count("L") for e in lines), [0, 5, 5, 5])

    def test_what_is_no_record(self):
        for text in ("", "[]", "{", "null", '{"results": []}'):
            self.refuses(text, "not a record")
        self.refuses(make_record(lambda r: r.pop("gpu")), "'gpu'")
        self.refuses(make_record(lambda r: r["results"][3].pop("tokens")), "'tokens'")
        self.refuses(make_record(lambda r: r["results"][0].update(tokens="1k")), "not a record")
        self.refuses(
            make_record(lambda r: r["results"][1]["kernels"]["torch-flash"].update(tflops=None)),
            "not a record")
        self.refuses(make_record(lambda r: r.update(format="other")), "another format, other")
        result = run("--from", self.file + ".missing")
        self.assertEqual(result.returncode, 1)
        self.assertIn("cannot be read: No such file", result.stderr)

    def test_figure_without_its_shapes(self):
        self.refuses(make_record(lambda r: r.update(results=[])), "no causal result", "--figure",
                     self.figure)
        self.refuses(make_record(), "cannot be written", "--figure", self.figure + "/x.svg")


class Errors(unittest.TestCase):
    def test_without_what_it_needs(self):
        result = run("--library", "/nowhere/libsagelm_attention.so", "--quick")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"^bench-peers: .*(PyTorch|GPU|is not there).*\n$")

    def test_library(self):
        with self.assertRaisesRegex(bench.Failure, "not there: build with CUDA"):
            bench.load_library("/nowhere/libsagelm_attention.so")
        with self.assertRaisesRegex(bench.Failure, "cannot be used"):
            bench.load_library(SCRIPT)

    def test_unknown_kernel(self):
        result = run("--kernels", "sagelm-sage9")
        self.assertEqual(result.returncode, 2)
        self.assertIn("there is no kernel sagelm-sage9; there are sagelm-sage2", result.stderr)


unittest.main()
