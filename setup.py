"""Packaging, and the C++ extension: `pip install -e . --no-build-isolation`.

The kernels in `csrc/` are compiled once per instruction set and chosen at run time. Without a working compiler the
package installs without the extension, says so, and runs on its pure-torch paths (`longtrain doctor` tells).
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# One object per entry: (namespace in the sources, flags).
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = [("generic", [])]
if X86:
    AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]
    INSTRUCTION_SETS += [("avx2", ["-mavx2", "-mfma", "-mf16c"]), ("avx512", AVX512), ("avx512bf16", [*AVX512, "-mavx512bf16"])]
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
KERNELS = ["longtrain.kernels"] if os.path.isdir("kernels") else []
PER_INSTRUCTION_SET = ["csrc/attention_kernels.cpp", "csrc/long_conv_kernels.cpp", "csrc/linear_attention_kernels.cpp"]


class BuildExtension(build_ext):
    """Compiles the per-instruction-set objects, then the rest; a failure leaves the extension out, loudly."""

    def run(self):
        try:
            super().run()
        except (BaseError, CCompilerError, OSError, ImportError) as error:
            line = "=" * 100
            print(
                f"\n{line}\nlongtrain: the C++ extension was NOT built: {error}\nThe pure-torch paths will be used; "
                f"they are several times slower on a CPU. Install a C++ compiler\n(g++ 11 or newer, or clang) and torch, "
                f"then run: pip install -e . --no-build-isolation\n{line}\n",
                file=sys.stderr,
            )
            self.extensions = []

    def build_extension(self, extension):
        from torch.utils import cpp_extension

        extension.include_dirs = ["csrc", *cpp_extension.include_paths()]
        extension.library_dirs = cpp_extension.library_paths()
        extension.libraries = ["c10", "torch_cpu", "torch"]
        # Compiled for OpenMP but not linked to it: the calls resolve to the runtime that torch brings, so that there
        # is one thread pool.
        extension.extra_compile_args = [*FLAGS, "-fopenmp"]
        if X86:
            extension.define_macros = [("LT_X86", None)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self.compile_kernels, INSTRUCTION_SETS))
        extension.extra_objects = [path for paths in objects for path in paths]
        super().build_extension(extension)

    def compile_kernels(self, instruction_set):
        name, flags = instruction_set
        return self.compiler.compile(
            PER_INSTRUCTION_SET[:1] if name == "avx512bf16" else PER_INSTRUCTION_SET,  # bf16 products are attention's alone
            output_dir=os.path.join(self.build_temp, name),
            macros=[("LT_ISA", name)],
            include_dirs=["csrc"],
            extra_postargs=[*FLAGS, *flags],
        )

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # loaded by torch.ops.load_library, not a Python module


setup(
    name="longtrain",
    version="0.1.0",
    description="Memory-efficient long-sequence training backend for PyTorch",
    python_requires=">=3.10",
    packages=find_packages(include=["longtrain", "longtrain.*"]) + KERNELS,
    package_dir={name: "kernels" for name in KERNELS},
    package_data={"longtrain.page": ["page.css", "page.js"], "longtrain.memory": ["page.css", "page.js"]},
    install_requires=["torch>=2.11", "numpy", "einops", "pyyaml", "safetensors"],
    extras_require={
        "flash": ["flash-attn"],
        "hf": ["transformers>=5.21,<6", "jinja2"],
        "lora": ["transformers>=5.21,<6", "jinja2", "peft"],
        "trainers": ["transformers>=5.21,<6", "accelerate", "peft", "trl"],
        "gpu": ["triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'"],
        "plot": ["matplotlib"],
        "tasks": ["matplotlib", "scikit-learn"],
        "tokenizers": ["tokenizers"],
        "parquet": ["pyarrow"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ninja", "scipy"],
    },
    entry_points={"console_scripts": ["longtrain = longtrain.cli:main"]},
    ext_modules=[
        Extension(
            "longtrain._C",
            sources=["csrc/attention.cpp", "csrc/linear_attention.cpp", "csrc/long_conv.cpp", "csrc/memory_trace.cpp"],
            depends=[*PER_INSTRUCTION_SET, *sorted(glob("csrc/*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
