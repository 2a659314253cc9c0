#!/bin/sh
# Fetch photographs under free licenses from Debian's packages into data/photos (300 MB of packages).
# Usage: datasets/photos.sh [FOLDER]      PYTHON=... names the interpreter (with Pillow)
set -eu
out=$(mkdir -p "${1:-data/photos}" && cd "${1:-data/photos}" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "photos.sh: apt-get and dpkg-deb were not found: it needs Debian, Ubuntu or a derivative." >&2
    echo "Elsewhere, train on a folder of your own photographs, or on the bundled ones." >&2
    exit 1
fi
debs="$out/.packages"
mkdir -p "$debs"
cd "$debs"
for package in $(tail -n +2 "$here/photos.tsv" | cut -f 1 | sort -u); do
    if ! ls "$package"_*.deb >/dev/null 2>&1; then
        echo "fetching $package"
        apt-get download "$package" || echo "photos.sh: $package could not be fetched; going on without it" >&2
    fi
done
"${PYTHON:-python3}" "$here/extract_photos.py" "$debs" "$out"
rm -rf "$debs"
