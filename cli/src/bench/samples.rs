//! Samples and what is said of them.

use std::time::Duration;

/// Measurements of one thing, in the order in which they were taken.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(transparent)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a time, in milliseconds.
    pub fn add_time(&mut self, time: Duration) {
        self.add(time.as_secs_f64() * 1e3);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The smallest sample that at least `percent` per cent of all samples do not exceed (the
    /// nearest-rank percentile: always a value that was measured). NaN when there are none.
    pub fn percentile(&self, percent: f64) -> f64 {
        let sorted = self.sorted();
        // The rank of a percentage of a number of samples: small, positive and finite.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted
            .get(rank.saturating_sub(1))
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// The median.
    pub fn p50(&self) -> f64 {
        self.percentile(50.0)
    }

    /// All of them from the smallest to the largest.
    pub fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The largest.
    pub fn worst(&self) -> f64 {
        self.percentile(100.0)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Samples(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let samples: Samples = (1..=20).rev().map(f64::from).collect();
        assert_eq!(samples.p50(), 10.0);
        assert_eq!(samples.percentile(95.0), 19.0);
        assert_eq!(samples.worst(), 20.0);
        assert_eq!(samples.percentile(0.0), 1.0);
    }

    #[test]
    fn one_sample_is_all_of_them() {
        let mut samples = Samples::default();
        samples.add_time(Duration::from_micros(1500));
        assert_eq!((samples.p50(), samples.worst()), (1.5, 1.5));
    }

    #[test]
    fn nothing_measured_is_no_number() {
        assert!(Samples::default().p50().is_nan());
    }
}
