#!/bin/sh
# Installs what the tests of the report drive, Debian's Chromium and its driver, where they are missing and apt can.
# Where it cannot, one line says why, and those tests are skipped; this script never fails.
have() { command -v "$1" >/dev/null 2>&1; }
skip() {
    echo "no Chromium with chromedriver here, so the report's browser tests are skipped: $1"
    exit 0
}
if have chromedriver && { have chromium || have google-chrome; }; then exit 0; fi
have apt-get || skip "there is no apt-get to install it with"
[ "$(id -u)" = 0 ] || skip "apt-get needs root (apt-get install chromium chromium-driver)"
log=$(mktemp)
timeout 120 apt-get -qq update >"$log" 2>&1
DEBIAN_FRONTEND=noninteractive timeout 600 \
    apt-get -qq -y --no-install-recommends install chromium chromium-driver >"$log" 2>&1 || {
    said=$(grep -m 1 '^E:' "$log" || tail -n 1 "$log")
    rm -f "$log"
    skip "apt-get says ${said:-nothing}"
}
rm -f "$log"
echo "installed Debian's chromium and chromium-driver for the report's browser tests"
