#!/usr/bin/env bash
# What the browser tests need, where it is missing: Chromium with its driver, and axe-core.
#
# With both on PATH nothing is installed but axe-core. On Debian and its like, root installs them
# with apt-get; anybody else gets them below .tools, beside this file. axe-core (MPL-2.0) comes from
# the npm registry into .tools; it is no part of mergebench.
set -euo pipefail
cd "$(dirname "$0")"
tools=$PWD/.tools
packages=(chromium chromium-driver)
axe=4.14.1
integrity=FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==

fail() {
    echo "tests/browser/install.sh: $*" >&2
    exit 1
}

on_path() {
    command -v chromedriver >/dev/null &&
        { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
}

as_root() {
    export DEBIAN_FRONTEND=noninteractive
    local wait=(-o DPkg::Lock::Timeout=600)
    apt-get "${wait[@]}" -qq update
    apt-get "${wait[@]}" -qq -y --no-install-recommends install "${packages[@]}" >/dev/null
}

# The packages and what they depend on, but for what the system has; checked by apt-get.
below() {
    rm -rf "$tools/unpacked" "$tools/packages"
    mkdir -p "$tools/unpacked" "$tools/packages"
    local planned names
    planned=$(apt-get -s --no-install-recommends install "${packages[@]}") ||
        fail "apt-get knows no chromium; run apt-get update as root"
    names=$(awk '$1 == "Inst" { print $2 }' <<<"$planned")
    (cd "$tools/packages" && apt-get -qq download $names)
    for each in "$tools/packages"/*.deb; do
        dpkg -x "$each" "$tools/unpacked"
    done
    rm -rf "$tools/packages"
}

if ! on_path && [[ ! -x $tools/unpacked/usr/bin/chromedriver ]]; then
    command -v apt-get >/dev/null ||
        fail "install Chromium and its chromedriver, so that both are on PATH"
    if [[ $(id -u) == 0 && -z ${BELOW:-} ]]; then as_root; else below; fi
fi

if [[ ! -f $tools/axe-$axe.js ]]; then
    mkdir -p "$tools/axe"
    cd "$tools/axe"
    file=axe-core-$axe.tgz
    if command -v npm >/dev/null; then
        npm pack --silent "axe-core@$axe" >/dev/null
    else
        python3 -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' \
            "https://registry.npmjs.org/axe-core/-/$file" "$file"
    fi
    found=$(python3 -c 'import base64, hashlib, sys
print(base64.b64encode(hashlib.sha512(open(sys.argv[1], "rb").read()).digest()).decode())' "$file")
    [[ $found == "$integrity" ]] || fail "axe-core $axe: another file than expected, sha512-$found"
    tar -xzf "$file" package/axe.min.js
    mv package/axe.min.js "$tools/axe-$axe.js"
    rm -rf "$tools/axe"
fi
