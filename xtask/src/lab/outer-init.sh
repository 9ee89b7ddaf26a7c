#!/bin/busybox sh
# The first process of the emulated machine: make it usable, run /lab/script, power off.
/bin/busybox --install -s /bin
export PATH=/lab/bin:/bin HOME=/tmp RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
ifconfig lo 127.0.0.1 up

while read -r module; do
    insmod "/lab/modules/$module" || echo "LAB FAIL modules: $module does not load"
done </lab/modules.order

pass() { echo "LAB PASS $1"; }
fail() { echo "LAB FAIL $1: $2"; }

echo "lab: Linux $(uname -r) up for $(cut -d' ' -f1 /proc/uptime) s, $(nproc) CPUs"
(while :; do
    echo "LAB TICK"
    sleep 2
done) </dev/null &
cd /tmp
(. /lab/script) </dev/null
status=$?
sync
echo "LAB END $status"
poweroff -f
