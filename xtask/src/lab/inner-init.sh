#!/bin/busybox sh
# The first process of the guest in Wherry. It takes commands on the serial port, one a line: a token and a shell
# command. What the command prints goes back, then a line "=TOKEN STATUS". The token "bye" ends the guest.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
ifconfig lo 127.0.0.1 up
cd /tmp

if [ -e /lab/modules.order ]; then
    while read -r module; do
        insmod "/lab/modules/$module" || echo "INNER: $module does not load"
    done </lab/modules.order
fi

exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr
echo "INNER READY Linux $(uname -r), $(nproc) CPUs, up $(cut -d' ' -f1 /proc/uptime) s"
while read -r token command; do
    [ "$token" = bye ] && break
    eval "$command"
    echo "=$token $?"
done
# Where the root is on a disk, everything has to be on it.
sync
mount -o remount,ro / 2>/dev/null
echo "INNER BYE"
poweroff -f
