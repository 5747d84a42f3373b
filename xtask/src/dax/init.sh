#!/bin/busybox sh
# The first process of the machine that `cargo xtask dax` starts: it serves persistent memory, and writes or checks its bytes.
# What it says behind "dax:" is what the other side waits for.
/bin/busybox --install -s /bin
export PATH=/bin XDG_RUNTIME_DIR=/run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
ifconfig lo 127.0.0.1 up

fail() {
    cat /run/serve.log
    echo "dax: failed: $*"
    poweroff -f
}

for module in libnvdimm nd_btt nd_pmem dax_pmem device_dax nfit; do
    insmod /modules/$module.ko || fail "no module $module"
done

# Gives a namespace frames: as a device-dax, or as a block device for a file system with DAX. A later boot finds it so.
namespace() {
    bus=/sys/bus/nd
    echo $1 >$bus/drivers/nd_pmem/unbind || fail "no $1"
    cat /proc/sys/kernel/random/uuid >$bus/devices/$2/uuid
    echo ram >$bus/devices/$2/mode
    echo 2097152 >$bus/devices/$2/align
    echo $1 >$bus/devices/$2/namespace
    echo $2 >$bus/drivers/$3/bind || fail "no $2"
}
phase=check
grep -q dax=write /proc/cmdline && phase=write
if [ $phase = write ]; then
    namespace namespace0.0 dax0.0 dax_pmem
    namespace namespace1.0 pfn1.0 nd_pmem
    mkfs.ext4 -q -b 4096 /dev/pmem1 || fail "no ext4"
fi
# The kernel looks for them on its own time.
for wait in $(seq 100); do
    [ -c /dev/dax0.0 ] && [ -b /dev/pmem1 ] && break
    sleep 0.1
done
[ -c /dev/dax0.0 ] || fail "no /dev/dax0.0"
mount -t ext4 -o dax /dev/pmem1 /mnt || fail "no ext4 with dax"

pgmap serve --pmem /dev/dax0.0 --pmem /mnt/disk.img,size=32M --pmem memory,size=1G,huge=1G \
    --nbd 127.0.0.1:10809 >/run/serve.log 2>&1 &
server=$!
until grep -qs ^control: /run/serve.log; do
    kill -0 $server 2>/dev/null || fail "the server ended"
    sleep 0.1
done
pgmap list
# One server has a device.
timeout 10 pgmap serve --pmem /dev/dax0.0 >/run/second.log 2>&1
grep "in use by another" /run/second.log || fail "a second server"
[ "$(pgmap list | grep -c map_sync)" = 2 ] || fail "list: no map_sync"

# What NBD answers before the first reply: its greeting, and the size of the export.
head=28
case $phase in
write)
    for device in pmem0 pmem1; do
        pgmap map $device --offset 4M --write </direct || fail "cannot write directly"
        # Four writes and a flush are answered by 16 bytes each.
        [ "$(nc 127.0.0.1 10809 </$device.write | wc -c)" = $((head + 5 * 16)) ] || fail "cannot write over NBD"
    done
    pgmap map pmem2 --write </direct || fail "cannot write to a huge page"
    pgmap map pmem2 | head -c 4194304 | cmp - /direct || fail "pmem2: not what was written"
    echo "dax: flushed"
    ;;
check)
    for device in pmem0 pmem1; do
        pgmap map $device --offset 4M --length 4M | cmp - /direct || fail "$device: not what was written directly"
        nc 127.0.0.1 10809 </$device.read | tail -c 4194304 | cmp - /nbd || fail "$device: not what was written over NBD"
    done
    # A device that goes away is an error, and no signal.
    echo dax0.0 >/sys/bus/dax/drivers/device_dax/unbind || fail "the device cannot be taken away"
    [ "$(nc 127.0.0.1 10809 </pmem0.read | wc -c)" -lt 4194304 ] || fail "bytes of no device"
    # The reply to the last write, before that to the flush: an I/O error.
    errno=$(nc 127.0.0.1 10809 </pmem0.write | tail -c 25 | head -c 1 | hexdump -e '1/1 "%d"')
    [ "$errno" = 5 ] || fail "written to no device: $errno"
    kill -0 $server || fail "the server died of its device"
    pgmap map pmem1 --offset 4M --length 4M | cmp - /direct || fail "the other device"
    echo "dax: found"
    ;;
esac
# Until somebody cuts the power.
sleep 600
