// The room of dmu-xend: reconcile, supervise, hotplug, control socket, status.

/// What is the same for the whole project.
public enum DMUXen {
  /// The version of everything in this package.
  public static let version = "0.1.0"
}
