//! Where the data of a file with holes lies.

/// A run of data inside a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// More runs than any file needs that fits in a layer worth keeping; bounds memory at 16 MiB.
pub(super) const MAX_EXTENTS: usize = 1 << 20;

/// Extents from offsets and lengths in turn: in order, apart, inside `real_size`, together `data_size`.
pub(super) fn check(
    extents: Vec<Extent>,
    real_size: u64,
    data_size: u64,
) -> Result<Vec<Extent>, &'static str> {
    const WRONG: &str = "a map of holes";
    let (mut end, mut sum) = (0_u64, 0_u64);
    for extent in &extents {
        if extent.offset < end {
            return Err(WRONG);
        }
        end = extent.offset.checked_add(extent.length).ok_or(WRONG)?;
        sum = sum.checked_add(extent.length).ok_or(WRONG)?;
    }
    if end > real_size || sum != data_size {
        return Err(WRONG);
    }
    Ok(extents)
}

pub(super) fn pair(numbers: &[u64]) -> Result<Vec<Extent>, &'static str> {
    if !numbers.len().is_multiple_of(2) || numbers.len() / 2 > MAX_EXTENTS {
        return Err("a map of holes");
    }
    Ok(numbers.chunks_exact(2).map(|pair| Extent { offset: pair[0], length: pair[1] }).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn test_check_when_map_is_wrong_then_error() {
        let map = |numbers: &[u64]| pair(numbers).unwrap();
        assert!(check(map(&[0, 5, 10, 5]), 20, 10).is_ok());
        assert!(check(map(&[0, 5, 4, 5]), 20, 10).is_err());
        assert!(check(map(&[10, 5, 0, 5]), 20, 10).is_err());
        assert!(check(map(&[16, 5]), 20, 5).is_err());
        assert!(check(map(&[0, 5]), 20, 6).is_err());
        assert!(check(map(&[u64::MAX, 2]), u64::MAX, 2).is_err());
        assert!(pair(&[1]).is_err());
    }
}
