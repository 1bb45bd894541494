/// The version of this worker, told to the daemon and by `cowd --version`.
public enum Version {
  /// As text.
  public static let text = "0.1.0"
}
