"""Build the C sources of ext/ once and link them twice.

The Cython module onnx_bitnet/_native and the plain custom-op library onnx_bitnet/libonnx_bitnet, which ONNX
Runtime loads, share the same objects. Each ext/kernels/*_<isa>.c is compiled with the flags of its row in
ext/isa.inc, all else with none of them. Metadata is in pyproject.toml. ONNX_BITNET_CFLAGS appends flags to
the compilation of our C (not of what Cython generates).
"""

import os
import platform
import re
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

EXT = Path("ext")
LIBRARY = "onnx_bitnet.libonnx_bitnet"
LIBRARY_SUFFIX = {"Windows": ".dll", "Darwin": ".dylib"}.get(platform.system(), ".so")
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())

# By compiler family: flags for all of our C; flags for what Cython generates; what makes an unknown flag an
# error in a probe; flags for the linker; what replaces the flags of isa.inc, which are those of gcc and clang
# (the first key wins).
COMPILERS = {
    "unix": {
        "flags": ["-O3", "-std=c11", "-fvisibility=hidden", "-ffp-contract=off"],
        "generated": ["-Wno-sign-compare"],
        "probe": ["-Werror"],
        "link": ["-pthread", "-lm"],
        "isa": {},
    },
    "msvc": {
        "flags": ["/O2", "/std:c11", "/fp:strict"],
        "generated": [],
        "probe": ["/options:strict"],
        "link": [],
        "isa": {"-mavx512f": ["/arch:AVX512"], "-mavx2": ["/arch:AVX2"]},
    },
}

ROW = re.compile(r'^BN_ISA\((\w+),\s*"([^"]*)",\s*(\w+)', re.M)


class BuildExt(build_ext):
    """Compile ext/ with flags per instruction set, then link the objects into both libraries."""

    def build_extensions(self):
        self.cython_c_in_temp = True
        family = COMPILERS.get(self.compiler.compiler_type, COMPILERS["unix"])
        extra = os.environ.get("ONNX_BITNET_CFLAGS", "").split()
        flags = family["flags"] + extra
        isas = {name: self.isa_flags(family, text) for name, text, _ in self.isa_rows()}
        isas = {name: own for name, own in isas.items() if self.knows(name, family["probe"] + own)}
        macros = [(f"BN_HAVE_{name}", str(int(name in isas))) for name, _, _ in self.isa_rows(every=True)]
        stamp = self.stamp(repr((flags, isas, macros)))

        core = self.objects(EXT.glob("*.c"), flags, macros, stamp)
        for name, own in isas.items():
            core += self.objects(EXT.glob(f"kernels/*_{name}.c"), flags + own, macros, stamp)
        ops = self.objects(EXT.glob("ops/*.c"), flags, macros, stamp)

        for extension in self.extensions:
            extension.include_dirs += [str(EXT)]
            extension.extra_compile_args += family["generated"]
            extension.extra_objects += core + (ops if extension.name == LIBRARY else [])
            extension.extra_link_args += family["link"] + [
                flag for flag in extra if flag.startswith("-fsanitize")
            ]
            extension.depends += [*extension.extra_objects, *self.headers(), str(stamp)]
        super().build_extensions()

    def isa_rows(self, every=False):
        """Return (name, flags, machine) of the rows of isa.inc for this machine, or of every row."""
        rows = ROW.findall((EXT / "isa.inc").read_text())
        return [row for row in rows if every or row[2] in ("any", MACHINE)]

    def isa_flags(self, family, text):
        """Spell the flags of a row for this compiler."""
        flags = text.split()
        if not flags or not family["isa"]:
            return flags
        return next((own for key, own in family["isa"].items() if key in flags), [])

    def knows(self, name, flags):
        """Return whether the compiler accepts the flags; if not, say that the row is dropped."""
        probe = Path(self.build_temp, f"probe_{name}.c")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("int main(void) { return 0; }\n")
        try:
            self.compiler.compile([str(probe)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError as error:
            print(f"onnx_bitnet: no {name} kernels, the compiler does not know their flags ({error})")
            return False
        return True

    def stamp(self, text):
        """Return a file that changes when the flags change, and only then."""
        path = Path(self.build_temp, "flags.txt")
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path

    def headers(self):
        """Return everything in ext/ that a source may include."""
        return [str(path) for pattern in ("*.h", "*.inc") for path in sorted(EXT.rglob(pattern))]

    def objects(self, sources, flags, macros, stamp):
        """Compile what is older than its source, any header, or the flags; return the object files."""
        folder = str(Path(self.build_temp, f"ext-{zlib.crc32(repr(flags).encode()):08x}"))
        objects = []
        for source in sorted(map(str, sources)):
            built = Path(self.compiler.object_filenames([source], output_dir=folder)[0])
            needed = [source, *self.headers(), __file__, str(stamp)]
            newest = max(Path(path).stat().st_mtime for path in needed)
            if self.force or not built.exists() or built.stat().st_mtime <= newest:
                self.compiler.compile(
                    [source], output_dir=folder, include_dirs=[str(EXT)], macros=macros, extra_postargs=flags
                )
            objects.append(str(built))
        return objects

    def get_ext_filename(self, fullname):
        """Give the custom-op library a plain name: no Python loads it."""
        if fullname in (LIBRARY, LIBRARY.rpartition(".")[2]):
            return str(Path(*fullname.split("."))) + LIBRARY_SUFFIX
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, extension):
        """Export the registration function alone; only Windows reads this list, others hide by default."""
        return ["RegisterCustomOps"] if extension.name == LIBRARY else super().get_export_symbols(extension)


setup(
    ext_modules=[Extension("onnx_bitnet._native", ["onnx_bitnet/_native.pyx"]), Extension(LIBRARY, [])],
    cmdclass={"build_ext": BuildExt},
)
