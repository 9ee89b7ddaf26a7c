#!/bin/busybox sh
# The first process of a guest in Wherry whose root is on its disk: it loads the drivers, and goes there.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
while read -r module; do
    insmod "/lab/modules/$module" || echo "INNER: $module does not load"
done </lab/modules.order
mkdir /disk
mount -t ext4 /dev/vda /disk || { echo "INNER: no root on /dev/vda"; poweroff -f; }
umount /dev /proc
exec switch_root /disk /init
