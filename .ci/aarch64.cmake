# CMake toolchain: x86-64 Linux builds for 64-bit ARM Linux, and runs what it built under QEMU.
# `.ci/neon` fills the root, a Debian with Python; that Python, emulated, tells CMake about itself.
get_filename_component(NEON_CACHE "${CMAKE_CURRENT_LIST_DIR}/../.cache/neon" ABSOLUTE)

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_SYSROOT "${NEON_CACHE}/root")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L "${NEON_CACHE}/root")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)

# With policy CMP0190 (CMake 4.1), FindPython runs the target's interpreter through the emulator.
file(GLOB Python_EXECUTABLE "${NEON_CACHE}/root/usr/bin/python3.[0-9]" "${NEON_CACHE}/root/usr/bin/python3.[0-9][0-9]")
