#!/bin/bash
# What there is now, a line for each thing: logical volumes with tags and content, files with attributes and content,
# domains, storage pools, and what the database says of its jobs. Asks LVM, the file system, libvirt and SQLite's own tool.
# usage: PLACE [VOLUME GROUP]
set -euo pipefail
place=$1 group=${2:-}

if [ -n "$group" ]; then
  udevadm settle
  # What is not active is read too, and left as it was found. A pool has no content of its own.
  content() {
    case $1 in t*) echo - && return ;; esac
    [ -n "$3" ] || lvchange --quiet --activate y --ignoreactivationskip "$group/$2" </dev/null >&2
    md5sum <"/dev/$group/$2" | cut -d' ' -f1
    [ -n "$3" ] || { udevadm settle && lvchange --quiet --activate n "$group/$2" </dev/null >&2; }
  }
  # The letter that says whether a volume is open is the auditor's too.
  lvs --reportformat json --units b --nosuffix -o lv_name,lv_size,lv_tags,lv_attr,lv_uuid,lv_active "$group" |
    jq -r '.report[0].lv[] | [.lv_name, .lv_size, (.lv_tags | split(",") | sort | join(",")), .lv_attr[0:5], .lv_uuid, .lv_active] | join("|")' |
    while IFS='|' read -r name size tags attributes uuid active; do
      content=$(content "$attributes" "$name" "$active")
      echo "volume $name: size=$size attributes=$attributes uuid=$uuid tags=$tags content=$content"
    done
  # One call, because each takes half a second in the emulated machine. The cache's private folder is no volume.
  virsh --quiet 'list --all --name; pool-list --all --name; pool-refresh images; vol-list images' |
    awk '/^Pool images refreshed/ || !NF || $1 == ".lvp" { next }
         NF == 2 { print "pool-volume images/" $1 ":"; next } { print "libvirt " $1 ":" }'
fi

{ find "$place/cache" "$place/volumes" "$place/qcow2" "$place/linked" ! -type d 2>/dev/null || true; } | sort | while read -r file; do
  # The lock file of the cache is there as long as the cache is.
  [ "$file" != "$place/cache/.lvp/lock" ] || continue
  attributes=$(getfattr --absolute-names --dump "$file" 2>/dev/null | sed -n 's/^user\.//p' | tr '\n' ';')
  content=$(md5sum <"$file" | cut -d' ' -f1)
  case $file in
  */linked/*.qcow2 | */qcow2/*.qcow2)
    qemu-img convert -f qcow2 -O raw "$file" "$place/raw" && content=$(md5sum <"$place/raw" | cut -d' ' -f1)
    rm -f "$place/raw"
    ;;
  esac
  echo "file ${file#"$place"/}: size=$(stat --format=%s "$file") mode=$(stat --format=%a "$file") attributes=$attributes content=$content"
done
{ find "$place/state" ! -type d ! -name "jobs.db*" ! -name lock 2>/dev/null || true; } | sed "s|^$place/|file |; s|$|:|"
if [ -e "$place/state/jobs.db" ]; then
  echo "database: $(sqlite3 "$place/state/jobs.db" 'PRAGMA integrity_check'), unfinished $(sqlite3 "$place/state/jobs.db" "SELECT count(*) FROM jobs WHERE finished_at IS NULL")"
fi
