#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes a Vagrant VM ready to test blocksnap; runs in the VM, as root, each time it is provisioned.
# A wheelhouse in the synced project (see vagrant-test.sh) stands in for the package index.
set -euo pipefail

project=${1:?usage: provision.sh PROJECT}
if [ -d "$project/vagrant/.wheelhouse" ]; then
    export BLOCKSNAP_WHEELHOUSE=$project/vagrant/.wheelhouse
fi
exec "$project/vagrant/bootstrap.sh"
