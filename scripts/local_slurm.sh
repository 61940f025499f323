#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for tests: `local_slurm.sh start DIR` prints the SLURM_CONF to export, `local_slurm.sh stop DIR`
# ends it, `local_slurm.sh node DIR NAME` starts the daemon of a node again. Debian's slurm-wlm, munge and iproute2, as root, no systemd
# needed. Each node is a network namespace with an address and a host name of its own, behind one bridge, and shares the disk with the
# others; where namespaces are not permitted, a line says so, and the nodes are two daemons on 127.0.0.0/8.
set -euo pipefail

action=${1:?start, stop or node}
dir=$(realpath -m "${2:?a folder for its state}")
host=$(hostname -s)
port=${SLURMCTLD_PORT:-16817}
nodes=(node01 node02)
bridge=slurm$port
subnet=198.18.$((port % 256)) # 198.18.0.0/15 is for tests of networks
export SLURM_CONF="$dir/slurm.conf"

address() { echo "$subnet.$((10#${1#node} + 1))"; }
namespace() { echo "slurm$port-$1"; }

remove_network() {
  for node in "${nodes[@]}"; do
    ip netns del "$(namespace "$node")" 2>/dev/null || true
  done
  ip link del "$bridge" 2>/dev/null || true
}

make_network() {
  command -v ip >/dev/null || return 1
  {
    echo "127.0.0.1 localhost"
    echo "$subnet.1 $host"
    for node in "${nodes[@]}"; do echo "$(address "$node") $node"; done
  } >"$dir/hosts"
  ip link add "$bridge" type bridge && ip addr add "$subnet.1/24" dev "$bridge" && ip link set "$bridge" up || return 1
  for node in "${nodes[@]}"; do
    local name
    name=$(namespace "$node")
    ip netns add "$name" || return 1
    ip link add "s$port-$node" type veth peer name eth0 netns "$name" || return 1
    ip link set "s$port-$node" master "$bridge" up
    ip -n "$name" addr add "$(address "$node")/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    inside "$node" true || return 1
  done
}

# A command on a node: with its network, its host name, and an /etc/hosts of its own. (`ip netns exec` hides the cgroups from slurmd.)
inside() {
  local node=$1
  shift
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/$(namespace "$node")" unshare --uts --mount sh -c \
    'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"' sh "$node" "$dir/hosts" "$@"
}

start_node() {
  if [ -e "/run/netns/$(namespace "$1")" ]; then
    inside "$1" slurmd -N "$1"
  else
    slurmd -N "$1"
  fi
}

stop() {
  if [ -f "$dir/slurmctld.pid" ]; then # what still runs would come back with the next start
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 40); do
      [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break
      sleep 0.5
    done
  fi
  for daemon in "${nodes[@]/#/slurmd-}" slurmctld munged; do
    [ "$daemon" != munged ] || ! pgrep -x slurmctld >/dev/null || continue # another SLURM of this machine needs it
    [ -f "$dir/$daemon.pid" ] || continue
    pid=$(cat "$dir/$daemon.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do # what still writes would be in the way of the next start
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    rm -f "$dir/$daemon.pid"
  done
  remove_network
}

case $action in
stop)
  stop
  exit 0
  ;;
node)
  start_node "${3:?a node}"
  exit 0
  ;;
esac

rm -rf "$dir"/{state,spool*,*.log}
mkdir -p "$dir/state" /run/munge /var/lib/munge /var/log/munge
chown munge:munge /run/munge /var/lib/munge /var/log/munge
if ! munge -n >/dev/null 2>&1; then
  rm -f /run/munge/munge.socket.2*
  runuser -u munge -- munged --force
  cp /run/munge/munged.pid "$dir/munged.pid" 2>/dev/null || true
fi

remove_network
processors=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which counts threads of OpenMP
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.45)}' /proc/meminfo) # of each node
lines=()
controller="$host"
if make_network >&2; then
  controller="$host($subnet.1)"
  for node in "${nodes[@]}"; do
    lines+=("NodeName=$node NodeAddr=$(address "$node") Port=${SLURMD_PORT:-16818} CPUs=$processors RealMemory=$memory")
  done
else
  echo "network namespaces are not permitted here: the nodes of this SLURM are two daemons on 127.0.0.0/8" >&2
  remove_network
  for node in "${nodes[@]}"; do
    number=$((10#${node#node}))
    lines+=("NodeName=$node NodeHostname=$host NodeAddr=127.0.0.$((number + 1)) Port=$((${SLURMD_PORT:-16818} + number - 1)) CPUs=$processors RealMemory=$memory")
  done
fi
cat >"$dir/slurm.conf" <<CONF
ClusterName=glmtuner
SlurmctldHost=$controller
SlurmctldPort=$port
$(printf '%s\n' "${lines[@]}")
PartitionName=tests Nodes=node[01-02] Default=YES MaxTime=INFINITE State=UP
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((memory / 4))
MpiDefault=none
JobRequeue=1
KillWait=5
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
CONF
slurmctld
for node in "${nodes[@]}"; do start_node "$node"; done
for _ in $(seq 60); do
  if [ "$(sinfo -h -o '%T %D' 2>/dev/null)" = "idle ${#nodes[@]}" ]; then
    echo "$SLURM_CONF"
    exit 0
  fi
  sleep 0.5
done
echo "SLURM did not start; its logs:" >&2
tail -n 20 "$dir"/*.log >&2
stop
exit 1
