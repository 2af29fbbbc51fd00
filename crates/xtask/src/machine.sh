#!/bin/sh
# Turns the Debian root directory $1 into the test machine's disk image and boot files in the directory $2.
# Run by `cargo xtask bed build`; the root is thrown away afterwards.
# It leaves out: the packages (machine.rs names them), and everything that changes from boot to boot (boot.rs).
set -eu
root=$1
out=$2

# --- who it is
echo bed >"$root/etc/hostname"
printf '127.0.0.1 localhost bed\n10.0.2.2 host\n' >"$root/etc/hosts"
echo 'nameserver 10.0.2.3' >"$root/etc/resolv.conf"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
echo '/dev/vda / ext4 defaults,noatime 0 0' >"$root/etc/fstab"
cat >"$root/etc/systemd/network/user.network" <<'EOF'
# QEMU's user network, without waiting for its DHCP server.
[Match]
Name=eth0
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
LinkLocalAddressing=no
IPv6AcceptRA=no
EOF
chroot "$root" systemctl --quiet enable systemd-networkd.service

# --- ssh: one key, no look-ups
ssh-keygen -q -t ed25519 -N '' -C bed -f "$out/key" </dev/null
mkdir -p "$root/root/.ssh"
cp "$out/key.pub" "$root/root/.ssh/authorized_keys"
chmod -R go= "$root/root/.ssh"
cat >"$root/etc/ssh/sshd_config.d/bed.conf" <<'EOF'
HostKey /etc/ssh/ssh_host_ed25519_key
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
MaxSessions 64
EOF

# --- the volume group, made at the first boot; SSH opens behind it, so whoever gets in finds it
cat >"$root/usr/local/sbin/bed-volumes" <<'EOF'
#!/bin/sh
# Makes the volume group vg0 on /dev/vdb, with the thin pool pool0 and more than 3 GiB left for thick volumes.
set -eu
vgs vg0 >/dev/null 2>&1 && exit 0
pvcreate --quiet /dev/vdb
vgcreate --quiet vg0 /dev/vdb
lvcreate --quiet --yes --type thin-pool --size 2G --chunksize 64k --zero y --name pool0 vg0
EOF
chmod 755 "$root/usr/local/sbin/bed-volumes"
cat >"$root/etc/systemd/system/bed-volumes.service" <<'EOF'
[Unit]
Description=Volume group of the test bed
After=lvm2-monitor.service
Before=ssh.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/bed-volumes
[Install]
WantedBy=multi-user.target
EOF
chroot "$root" systemctl --quiet enable bed-volumes.service

# --- nothing that costs boot time or runs behind a test's back
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
  fstrim.timer getty@tty1.service serial-getty@ttyS0.service libvirt-guests.service systemd-networkd-wait-online.service \
  systemd-hwdb-update.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
rm -f "$root/etc/libvirt/qemu/networks/autostart/default.xml"
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/bed.conf"

# --- boot files and disk image
cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp "$root"/boot/initrd.img-* "$out/initrd"
rm -f "$root"/boot/vmlinuz-* "$root"/boot/initrd.img-* "$root"/var/cache/apt/archives/*.deb
truncate -s 4G "$out/root.img"
mke2fs -q -F -t ext4 -L bed -m 0 -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$out/root.img"
