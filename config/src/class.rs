//! Size classes: the few sizes that machines have, and which of them a container gets.
//!
//! A template fits one size alone, so sizes are few: memory is the default class, or that doubled, and doubled again; the
//! number of vCPUs a power of two. Memory that is not written to costs nothing in a fork, so a larger class is cheap; the
//! container's own limit stays what it is and acts inside.

use crate::Vm;

/// MiB that a guest's kernel and agent need in any class: the kernel's image, the agent and what it runs in, slabs.
const KERNEL_MIB: u64 = 48;

/// One part in this many of its memory that a guest's kernel takes to look after it: 64 bytes for each page of 4 KiB are
/// one in 64, page tables and per-CPU data as much again.
const KERNEL_SHARE: u64 = 32;

/// Microseconds of a processor quota's period when the container's configuration names none (the kernel's own).
const PERIOD_US: u64 = 100_000;

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Class {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Class {
    /// Memory in bytes.
    pub fn memory_bytes(self) -> u64 {
        self.memory_mib << 20
    }

    /// What of the memory is left for a container, in MiB.
    fn for_container(self) -> u64 {
        self.memory_mib
            .saturating_sub(KERNEL_MIB + self.memory_mib / KERNEL_SHARE)
    }
}

/// What a container is limited to; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Microseconds of processor time in each period, and the period, if one is named.
    pub quota: Option<(u64, Option<u64>)>,
    /// Number of processors that it may run on (cpuset).
    pub cpuset: Option<usize>,
}

/// A container that asks for more than the largest class has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// Of memory.
    #[error(
        "a memory limit of {asked} MiB: the largest machine has {largest} MiB, of which a container can have {left} \
         (vm.max_memory_mib in the configuration)"
    )]
    Memory {
        /// MiB, rounded up.
        asked: u64,
        /// Memory of the largest class in MiB.
        largest: u64,
        /// What that leaves for a container, in MiB.
        left: u64,
    },
    /// Of processors.
    #[error(
        "a processor limit of {asked} CPUs: the largest machine has {largest} (vm.max_vcpus in the configuration)"
    )]
    Cpus {
        /// CPUs, rounded up.
        asked: u64,
        /// vCPUs of the largest class.
        largest: u8,
    },
}

/// A container that is to get more than its machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DoesNotFit {
    /// Of memory.
    #[error(
        "a memory limit of {asked} MiB in a machine of {has} MiB, of which a container can have {left}: start the \
         container with that limit, for a larger one"
    )]
    Memory {
        /// MiB, rounded up.
        asked: u64,
        /// The machine's memory in MiB.
        has: u64,
        /// What that leaves for a container, in MiB.
        left: u64,
    },
    /// Of processors.
    #[error(
        "a processor limit of {asked} CPUs in a machine of {has}: start the container with that limit, for a larger one"
    )]
    Cpus {
        /// CPUs, rounded up.
        asked: u64,
        /// The machine's vCPUs.
        has: u8,
    },
}

impl Class {
    /// Whether a machine of this size has what a container is to get. No limit fits every machine.
    ///
    /// # Errors
    /// [`DoesNotFit`].
    pub fn holds(self, demand: &Demand) -> Result<(), DoesNotFit> {
        let asked = demand.memory.unwrap_or(0).div_ceil(1 << 20);
        let left = self.for_container();
        if asked > left {
            let has = self.memory_mib;
            return Err(DoesNotFit::Memory { asked, has, left });
        }
        match demand.cpus() {
            Some(asked) if asked > self.vcpus.into() => {
                let has = self.vcpus;
                Err(DoesNotFit::Cpus { asked, has })
            }
            _ => Ok(()),
        }
    }
}

impl Demand {
    /// CPUs that the quota comes to, rounded up.
    fn cpus(&self) -> Option<u64> {
        let (quota, period) = self.quota?;
        Some(quota.div_ceil(period.unwrap_or(PERIOD_US).max(1)))
    }
}

impl Vm {
    /// The class of a container.
    ///
    /// A limit that fits the default class gets that: a smaller one would save nothing, as pages count when they are
    /// written to, and be one more template. vCPUs do get fewer than the default: more of them than the container has
    /// processors would wait for each other. A cpuset says where to run, a quota how much; only the latter can be too
    /// large.
    ///
    /// # Errors
    /// [`TooLarge`].
    pub fn class(&self, demand: &Demand) -> Result<Class, TooLarge> {
        let vcpus = self.vcpus_for(demand)?;
        let asked = demand.memory.unwrap_or(0).div_ceil(1 << 20);
        let largest = self.max_memory_mib.max(self.memory_mib);
        let mut class = Class {
            vcpus,
            memory_mib: self.memory_mib,
        };
        while class.for_container() < asked {
            if class.memory_mib == largest {
                return Err(TooLarge::Memory {
                    asked,
                    largest,
                    left: class.for_container(),
                });
            }
            class.memory_mib = largest.min(class.memory_mib * 2);
        }
        Ok(class)
    }

    fn vcpus_for(&self, demand: &Demand) -> Result<u8, TooLarge> {
        let largest = self.max_vcpus.max(self.vcpus);
        let quota = demand.cpus();
        if let Some(asked) = quota.filter(|asked| *asked > largest.into()) {
            return Err(TooLarge::Cpus { asked, largest });
        }
        let cpuset = demand.cpuset.map(|cpus| cpus as u64);
        let Some(cpus) = [quota, cpuset].into_iter().flatten().min() else {
            return Ok(self.vcpus);
        };
        // At most the largest class, which fits a `u8`.
        let rounded = cpus.clamp(1, largest.into()).next_power_of_two();
        Ok(u8::try_from(rounded).unwrap_or(largest).min(largest))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VM: Vm = Vm {
        vcpus: 2,
        max_vcpus: 8,
        memory_mib: 512,
        max_memory_mib: 4096,
    };

    fn memory(mib: u64) -> Demand {
        Demand {
            memory: Some(mib << 20),
            ..Demand::default()
        }
    }

    fn quota(quota: u64, period: Option<u64>) -> Demand {
        Demand {
            quota: Some((quota, period)),
            ..Demand::default()
        }
    }

    #[test]
    fn a_container_without_limits_gets_the_default() {
        let class = VM.class(&Demand::default()).unwrap();
        assert_eq!((class.vcpus, class.memory_mib), (2, 512));
    }

    #[test]
    fn memory_doubles_until_the_limit_and_the_kernel_fit() {
        // 48 MiB and a 32nd are the guest's own: 448 of 512, 944 of 1024, 3920 of 4096.
        for (limit, class) in [
            (1, 512),
            (448, 512),
            (449, 1024),
            (512, 1024),
            (944, 1024),
            (945, 2048),
            (3920, 4096),
        ] {
            assert_eq!(
                VM.class(&memory(limit)).unwrap().memory_mib,
                class,
                "{limit}"
            );
        }
        let error = VM.class(&memory(3921)).unwrap_err().to_string();
        assert!(
            error.contains("3921 MiB")
                && error.contains("4096 MiB")
                && error.contains("vm.max_memory_mib"),
            "{error}"
        );
    }

    #[test]
    fn the_largest_class_need_not_be_a_doubling() {
        let vm = Vm {
            max_memory_mib: 700,
            ..VM
        };
        assert_eq!(vm.class(&memory(600)).unwrap().memory_mib, 700);
        // One that is below the default is no class at all.
        let vm = Vm {
            max_memory_mib: 128,
            ..VM
        };
        assert_eq!(vm.class(&memory(100)).unwrap().memory_mib, 512);
        assert!(vm.class(&memory(500)).is_err());
    }

    #[test]
    fn vcpus_are_the_quota_rounded_up() {
        for (microseconds, period, vcpus) in [
            (50_000, None, 1),
            (100_000, Some(100_000), 1),
            (150_000, Some(100_000), 2),
            (300_000, Some(100_000), 4),
            (20_000, Some(10_000), 2),
            (800_000, None, 8),
            (1, Some(0), 1),
        ] {
            assert_eq!(
                VM.class(&quota(microseconds, period)).unwrap().vcpus,
                vcpus,
                "{microseconds}"
            );
        }
        let error = VM.class(&quota(900_000, None)).unwrap_err().to_string();
        assert!(
            error.contains("9 CPUs") && error.contains("vm.max_vcpus"),
            "{error}"
        );
    }

    #[test]
    fn a_cpuset_bounds_and_is_never_too_large() {
        let cpus = |cpuset, quota| {
            let demand = Demand {
                cpuset: Some(cpuset),
                quota,
                ..Demand::default()
            };
            VM.class(&demand).unwrap().vcpus
        };
        assert_eq!(cpus(1, None), 1);
        assert_eq!(cpus(3, None), 4);
        assert_eq!(cpus(64, None), 8);
        assert_eq!(cpus(1, Some((400_000, None))), 1);
        assert_eq!(cpus(64, Some((200_000, None))), 2);
    }

    proptest! {
        /// Whatever is asked for: a class has room for it, is one of a few, and the next smaller one would not do.
        #[test]
        fn a_class_fits_and_is_the_smallest(limit in 0_u64..(8 << 30), quota in 0_u64..2_000_000, cpuset in 0_usize..100) {
            let demand = Demand { memory: Some(limit), quota: Some((quota, None)), cpuset: Some(cpuset) };
            if let Ok(class) = VM.class(&demand) {
                prop_assert!([512, 1024, 2048, 4096].contains(&class.memory_mib));
                prop_assert!([1, 2, 4, 8].contains(&class.vcpus));
                prop_assert!(class.for_container() << 20 >= limit);
                let smaller = Class { memory_mib: class.memory_mib / 2, ..class };
                prop_assert!(class.memory_mib == 512 || smaller.for_container() << 20 < limit);
            }
        }
    }
}
