#!/usr/bin/env bash
# Writes the lock of the CUDA stack: wheels.txt, and sources.txt for the two packages that are published as source.
# Linux on x86_64, Python 3.11 and 3.12. It takes uv; nothing of the stack is downloaded but what the index says of it.
#     bash launch/container/lock.sh            # after a change of setup.py: the other versions stay
#     bash launch/container/lock.sh --upgrade  # the newest versions that setup.py admits
set -euo pipefail
cd "$(dirname "$0")/../.."

SOURCES='^(deepspeed|flash-attn)=='
HERE=launch/container
all=$(mktemp)
trap 'rm -f "$all"' EXIT
cat "$HERE"/wheels.txt "$HERE"/sources.txt > "$all" 2> /dev/null || true  # uv keeps the versions of its output file
uv pip compile --quiet --no-header --generate-hashes --output-file "$all" "$@" \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --extra cuda --extra watch --extra pairs setup.py "$HERE/build.in" > /dev/null
split() {
    echo "# Written by launch/container/lock.sh, which says how; not to be edited."
    awk -v sources="$SOURCES" -v wanted="$1" '/^[a-z0-9]/ {source = $0 ~ sources} source == wanted' "$all"
}
split 0 > "$HERE/wheels.txt"
split 1 > "$HERE/sources.txt"
