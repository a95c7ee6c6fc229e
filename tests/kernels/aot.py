"""Compile the shipped kernels ahead of time: python tests/kernels/aot.py --arch 90

Needs no GPU, only the compiler inside triton; TRITON_INTERPRET must be unset. Prints one JSON line
per kernel: registers, stack (spills), shared memory and the tensor-core instructions of each.
--workers spreads the kernels over processes (a second or ten each).
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[2]
MANY = (64, 128, 256, 512, 768)
DIMS = {"one": (768,), "both": (768,)}
DIMS |= {of: MANY for of in ("many", "many both", "softplus", "ragged")}
BOTH = "columns row_limit column_limit"
SOFTPLUS = "softplus row_limit"
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}  # tf32: float32, multiplied fast


def load_kernels():
    path = ROOT / "kernels" / "infonce_triton.py"
    spec = importlib.util.spec_from_file_location("infonce_triton", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["infonce_triton"] = module
    spec.loader.exec_module(module)
    return module


def cases(
    module, arch: int, dims: list[str], options: list[str], dtypes: list[str],
    is_ragged: bool = False,
):  # fmt: skip
    """(kernel, dims, dtype, options) of every shipped tile with those options."""
    tiles = module.TILES_90 if arch == 90 else module.TILES_80
    for kernel, of, size in tiles:
        for dtype in dtypes:
            if of not in dims or DTYPES[dtype] != size or (kernel == "exps" and dtype == "fp16"):
                continue
            if of == "ragged":
                for option in ("columns", BOTH, SOFTPLUS) if is_ragged else ():
                    yield kernel, of, dtype, option
            elif (
                is_ragged and of in ("many both", "softplus") and (kernel, "ragged", size) in tiles
            ):
                continue
            elif of in ("both", "many both"):
                yield kernel, of, dtype, BOTH
            elif of == "softplus":
                yield kernel, of, dtype, SOFTPLUS
            elif kernel == "exps":
                yield kernel, of, dtype, "row_limit"
            else:
                for option in options:
                    other = {
                        ("one", BOTH): "both",
                        ("many", BOTH): "many both",
                        ("many", SOFTPLUS): "softplus",
                    }.get((of, option))
                    if is_ragged and of == "many" and option:
                        other = "ragged"
                    if (kernel, other, size) not in tiles:  # else compiled with its own tile
                        yield kernel, of, dtype, option


def compile_case(
    module, kernel: str, many: str, dtype: str, option: str, arch: int, tile=None, *,
    ends: tuple[int, ...] | None = None, is_ragged: bool = False,
):  # fmt: skip
    """
    ends       dims in place of those of DIMS
    is_ragged  16 does not divide the numbers of rows and columns
    """
    function = getattr(module, f"_{kernel}_kernel")
    tiles = module.TILES_90 if arch >= 90 else module.TILES_80
    tile = tile or tiles[kernel, many, DTYPES[dtype]]
    dims = ends or DIMS[many]
    constants = {
        "S": dims[-1], "ENDS": dims, "M": len(dims), "HELD": min(tile.held, len(dims) - 1),
        "BR": tile.rows, "BC": tile.columns, "BF": tile.features, "GROUP": module._GROUP,
        "ROW_LIMIT": "row_limit" in option, "COLUMN_LIMIT": "column_limit" in option,
        "COLUMNS": "columns" in option.split(), "SOFTPLUS": "softplus" in option,
        "TMA": tile.tma, "UPCAST": False,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
    }  # fmt: skip
    element = "fp32" if dtype == "tf32" else dtype
    names = function.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "relatives":
            signature[name] = "*i32"
        elif name in ("q", "p") and tile.tma:
            block = tile.rows if name == "q" else tile.columns
            signature[name] = f"tensordesc<{element}[{block}, {tile.features}]>"
        elif name in ("q", "p", "planes", "exps"):
            signature[name] = f"*{element}"
        elif name in ("c", "N", "K") or name.endswith(("stride", "_rows", "_columns")):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        # as at run time: pointers and sizes that 16 divides are known as such; K is not
        is_size = name in ("c", "N") or name.endswith("stride")
        if name != "K" and signature[name][0] in "*i" and not (is_ragged and is_size):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(names.index(n),): v for n, v in constants.items() if n in names}
    start = time.monotonic()
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return {
        "kernel": kernel, "dims": len(dims), "dtype": dtype, "options": option, "arch": arch,
        "triton": triton.__version__, "is_ragged": is_ragged,
        "tile": f"{tile.rows}x{tile.columns}x{tile.features}", "warps": tile.warps,
        "stages": tile.stages, "held": constants.get((names.index("HELD"),), 0)
        if "HELD" in names else 0,
        "registers": registers, "stack_bytes": stack, "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
        "async_copies": ptx.count("cp.async.cg.shared"),
        "compile_s": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread: spills) by the dumper that triton ships."""
    dumper = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        out = subprocess.run([dumper, "-res-usage", f.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout + out.stderr)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of registers: {out.stdout} {out.stderr}")
    return int(found[1]), int(found[2])


def compile_one(args: argparse.Namespace, case: tuple[str, str, str, str]) -> dict:
    ends = tuple(map(int, args.ends.split(","))) if args.ends else None
    options = {"ends": ends, "is_ragged": args.ragged}
    return compile_case(load_kernels(), *case, args.arch, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=(90, 80))
    parser.add_argument("--dims", nargs="+", default=list(DIMS), choices=list(DIMS))
    parser.add_argument("--options", nargs="+", default=["", "columns", SOFTPLUS, BOTH])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--ends", metavar="LIST", help="dims with commas, for all chosen tiles")
    parser.add_argument("--ragged", action="store_true", help="sizes that 16 does not divide")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    options = args.arch, args.dims, args.options, args.dtypes, args.ragged
    chosen = list(cases(load_kernels(), *options))
    if args.workers == 1:
        rows = (compile_one(args, case) for case in chosen)
    else:
        rows = ProcessPoolExecutor(args.workers).map(compile_one, [args] * len(chosen), chosen)
    for row in rows:
        print(json.dumps(row), flush=True)
