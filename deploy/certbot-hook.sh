#!/bin/sh
# certbot's deploy hook: chain and key in one file, as HAProxy wants them, and a reload.
set -eu
umask 077
file=/etc/haproxy/price-tracker.pem
cat "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem" > "$file.new"
mv "$file.new" "$file"
systemctl reload haproxy
